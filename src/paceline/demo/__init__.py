"""What does Paceline do, seen on one bare machine in about a minute?

Everything runs as it would in earnest, each process started from the command line: four emulated
engines, a real small model where it is installed, and a gateway before them. The same requests come
twice, once dealt out by round-robin and once by headroom, and each time one engine is slow for a
while.
"""

from paceline.demo.play import run_demo

__all__ = ["run_demo"]
