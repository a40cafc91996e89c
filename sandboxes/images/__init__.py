"""What container sandboxes are made of: the base image's recipe and the system calls that they may make."""
