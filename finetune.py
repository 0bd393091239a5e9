"""`unlabeled finetune` as a script, for launchers that need a file.

``accelerate launch finetune.py TARGET data=folder data.path=... out=runs/x``
"""

import sys

from unlabeled.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
