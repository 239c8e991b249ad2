"""What produces every figure that the README quotes."""
