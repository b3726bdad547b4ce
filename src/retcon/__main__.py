"""`python -m retcon`: the command line."""

from retcon.cli import main

if __name__ == "__main__":
    main()
