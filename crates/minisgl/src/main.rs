//! The minisgl binary.

fn main() {}
