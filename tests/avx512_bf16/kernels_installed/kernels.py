"""Stands for the package `kernels`, which loads compiled code from the Hub: importing it ends the program."""

import sys

sys.exit("bitsandbytes loads compiled code from the Hub")
