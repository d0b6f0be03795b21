"""From a base model to an instructed and a preferred one."""
