"""`unlabeled pretrain` as a script, for launchers that need a file.

``accelerate launch pretrain.py task=mae data=folder data.path=... out=runs/x``
"""

import sys

from unlabeled.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
