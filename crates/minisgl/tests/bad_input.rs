//! What is wrong on the command line or in a file is a clear error and an exit code.

use std::path::PathBuf;
use std::process::{Command, Output};

fn minisgl(args: &[&str]) -> (Output, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_minisgl")).args(args).output().unwrap();
    let said = String::from_utf8(output.stderr.clone()).unwrap();
    assert!(!said.contains("panicked"), "{args:?}: {said}");
    (output, said)
}

/// A file of its own for one test.
fn file(name: &str, bytes: &[u8]) -> PathBuf {
    let path = std::env::temp_dir().join(format!("minisgl-{}-{name}", std::process::id()));
    std::fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn bad_flags_are_usage_errors() {
    for (args, says) in [
        (&["frobnicate"][..], "frobnicate"),
        (&["bench", "steps", "--page-size", "many"][..], "--page-size"),
        (&["bench", "steps", "--device", "tpu"][..], "cpu, cuda, cuda:N or auto"),
        (&["bench", "steps", "--tp", "-1"][..], "--tp"),
        (&["inspect", "--model-source", "ftp"][..], "modelscope"),
    ] {
        let (output, said) = minisgl(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {said}");
        assert!(said.contains(says), "{args:?}: {said}");
    }
}

#[test]
fn damaged_files_are_named() {
    let mut cut = b"GGUF".to_vec();
    cut.extend(3u32.to_le_bytes());
    cut.extend(u64::MAX.to_le_bytes());
    for (name, bytes) in
        [("empty.gguf", &b""[..]), ("text.gguf", b"hello, this is no model"), ("cut.gguf", &cut)]
    {
        let path = file(name, bytes);
        let (output, said) = minisgl(&["inspect", path.to_str().unwrap()]);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(output.status.code(), Some(1), "{name}: {said}");
        assert!(said.contains(name), "{name}: {said}");
    }
}

#[test]
fn a_folder_without_a_configuration_says_what_it_lacks() {
    let folder = std::env::temp_dir().join(format!("minisgl-{}-folder", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let (output, said) = minisgl(&["inspect", folder.to_str().unwrap()]);
    std::fs::remove_dir_all(&folder).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(said.contains("has no config.json"), "{said}");
}
