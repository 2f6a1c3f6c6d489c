"""Code that is only there for the compiler: each module says what is slow or wrong without it."""
