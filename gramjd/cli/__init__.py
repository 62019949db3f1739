"""What ``python -m gramjd`` does; nothing else imports it."""
