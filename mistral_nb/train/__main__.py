"""`torchrun --nproc-per-node N -m mistral_nb.train cfg.yaml`: the same loop in every process."""

from mistral_nb.train.launch import main

if __name__ == "__main__": raise SystemExit(main())
