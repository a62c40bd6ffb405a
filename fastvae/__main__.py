"""`python -m fastvae` is the command `fastvae`."""

from fastvae_command import main

if __name__ == "__main__":
    main()
