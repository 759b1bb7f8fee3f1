"""The commands of ``wcitrain``: ``options`` declares them, the file of a command's name has its ``run``."""
