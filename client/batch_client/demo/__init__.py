"""What `make demo` shows: real digits, a small network and a real S3 server, all on this machine."""
