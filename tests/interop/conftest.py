"""The program, run like an operator."""

from tests.support.program import program, start_program

__all__ = ["program", "start_program"]
