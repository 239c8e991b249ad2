"""Each file is a dialect: the bodies that clients of one server send, and the answers that they read."""
