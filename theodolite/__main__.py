"""``python -m theodolite`` is the same as the ``theodolite`` command."""

from theodolite.cli import main

if __name__ == "__main__":
    main()
