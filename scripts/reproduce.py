"""The claims of the RigL paper in miniature: their runs, a table and a figure.

python scripts/reproduce.py --list
python scripts/reproduce.py methods --task=digits --seeds=5

Started again, it goes on where it was interrupted; SIGTERM saves the run at hand.
"""

if __name__ == "__main__":
    import huge_pages

    huge_pages.use()

import sys

from rigl_optax.reports.reproduce import command

if __name__ == "__main__":
    sys.exit(command.main(sys.argv[1:]))
