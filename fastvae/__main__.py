"""`python -m fastvae` is the command `fastvae`."""

from fastvae.cli import main

if __name__ == "__main__":
    main()
