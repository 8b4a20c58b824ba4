"""The command line: commands, tables, errors, exit codes."""
