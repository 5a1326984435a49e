__version__ = "0.1.0"
"""Fine-tune Mistral models from a notebook."""
