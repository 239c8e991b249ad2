"""The command ends with these statuses, which shells show for a program that a signal has ended."""

BROKEN_PIPE = 141  # SIGPIPE
INTERRUPTED = 130  # SIGINT
