"""The command ``grating`` has a module for each subject; :mod:`grating_core.cli.commands` puts them together."""
