"""The commands of `healthgpt-edge`, a file for each, and what they share. Heavy modules are imported when one runs."""
