"""What a job will be like, before it runs."""
