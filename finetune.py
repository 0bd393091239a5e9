"""``accelerate launch finetune.py TARGET data=folder data.path=... out=runs/x``: `unlabeled finetune` by a file."""

import sys

from unlabeled.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
