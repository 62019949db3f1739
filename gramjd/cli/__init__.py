"""The commands of ``python -m gramjd``; nothing else imports this package."""
