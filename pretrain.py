"""``accelerate launch pretrain.py task=mae data=folder data.path=... out=runs/x``: `unlabeled pretrain` by a file."""

import sys

from unlabeled.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
