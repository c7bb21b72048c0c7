//! Mini-SGLang in Rust.
