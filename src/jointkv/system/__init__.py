"""What lies outside: environment variables, files, compilers, the machine, other packages."""
