//! The kernels whose threads wait for one another in the most ways, against f64, without a card: C++ that
//! takes their sources as they are runs them on the machine of `emulator/machine.h`. Needs a C++ compiler.

#![cfg(target_os = "linux")]

use std::path::{Path, PathBuf};
use std::process::Command;

use rayon::prelude::*;

/// Orders of what happens at once, and inputs. Enough that a wait which is missing shows.
const SEEDS: [&str; 4] = ["1", "2", "3", "4"];

/// Programs of `emulator`, and what the kernel is specialised by.
const PROGRAMS: [(&str, &[(&str, i32)]); 27] = [
    ("attend", &[("DIM", 128), ("GROUP", 2), ("SECOND", 2), ("LATE", 32)]),
    ("attend", &[("DIM", 128), ("GROUP", 2), ("SECOND", 8), ("LATE", 18)]),
    ("attend", &[("DIM", 64), ("GROUP", 12), ("SECOND", 2), ("LATE", 0)]),
    ("decode", &[("DIM", 128), ("GROUP", 2), ("SOFT_CAP", 0), ("CASCADE", 0)]),
    ("decode", &[("DIM", 64), ("GROUP", 4), ("SOFT_CAP", 1), ("CASCADE", 1)]),
    ("head", &[("ROWS", 64)]),
    ("head", &[("ROWS", 128)]),
    ("mlp", &[("CLUSTER", 8), ("FIRST", 2), ("SECOND", 3)]),
    ("mlp", &[("CLUSTER", 8), ("FIRST", 3), ("SECOND", 8)]),
    ("narrow", &[("ROWS", 32), ("GROUPS", 1), ("GATED", 0), ("NORM", 1)]),
    ("narrow", &[("ROWS", 64), ("GROUPS", 1), ("GATED", 0), ("NORM", 0)]),
    ("narrow", &[("ROWS", 32), ("GROUPS", 2), ("GATED", 1), ("NORM", 1)]),
    ("prefill", &[("DIM", 128), ("GROUP", 2), ("SOFT_CAP", 0)]),
    ("prefill", &[("DIM", 64), ("GROUP", 3), ("SOFT_CAP", 1)]),
    ("sample", &[("CHUNK", 128)]),
    ("sample", &[("CHUNK", 512)]),
    ("stream", &[("HALVES", 1), ("TILES", 1), ("GATED", 0), ("NORM", 0), ("OUT_F32", 0)]),
    ("stream", &[("HALVES", 1), ("TILES", 2), ("GATED", 1), ("NORM", 1), ("OUT_F32", 0)]),
    ("stream", &[("HALVES", 2), ("TILES", 1), ("GATED", 0), ("NORM", 1), ("OUT_F32", 1)]),
    ("wide", &[("STAGES", 8), ("NORM", 0), ("GATED", 0), ("OUT_F32", 1)]),
    ("wide", &[("STAGES", 12), ("NORM", 1), ("GATED", 0), ("OUT_F32", 0)]),
    ("wide", &[("STAGES", 10), ("NORM", 1), ("GATED", 1), ("OUT_F32", 0)]),
    ("decode", &[("DIM", 64), ("GROUP", 4), ("SOFT_CAP", 1), ("CASCADE", 0), ("RACE_CHECKED", 1)]),
    ("head", &[("ROWS", 64), ("RACE_CHECKED", 1)]),
    ("narrow", &[("ROWS", 32), ("GROUPS", 1), ("GATED", 1), ("NORM", 1), ("RACE_CHECKED", 1)]),
    ("prefill", &[("DIM", 64), ("GROUP", 2), ("SOFT_CAP", 0), ("RACE_CHECKED", 1)]),
    ("wide", &[("STAGES", 8), ("NORM", 1), ("GATED", 0), ("OUT_F32", 0), ("RACE_CHECKED", 1)]),
];

/// What `strip.cpp` is specialised by, and in what ways.
const STRIP: [&str; 7] = ["SHORT", "X_ROWS", "UNITS", "BLOCKS", "GATED", "NORM", "RACE_CHECKED"];
const STRIPS: [[i32; 7]; 18] = [
    [0, 32, 9, 1, 0, 0, 0],
    [0, 32, 3, 2, 1, 1, 0],
    [0, 64, 7, 2, 0, 1, 0],
    [0, 64, 5, 4, 1, 1, 0],
    [0, 64, 5, 1, 1, 0, 0],
    [0, 64, 4, 4, 0, 0, 0],
    [0, 64, 5, 2, 0, 1, 1],
    [1, 64, 3, 1, 1, 1, 0],
    [1, 64, 2, 1, 0, 1, 0],
    [1, 64, 7, 1, 0, 0, 0],
    [1, 64, 3, 1, 1, 1, 1],
    [0, 128, 4, 2, 1, 1, 0],
    [0, 128, 5, 4, 0, 0, 0],
    [0, 128, 3, 4, 0, 1, 0],
    [0, 128, 3, 2, 0, 1, 1],
    [0, 128, 4, 1, 0, 1, 0],
    [0, 128, 6, 1, 1, 1, 0],
    [0, 128, 3, 1, 0, 0, 0],
];

/// Panics with what it printed if it fails.
fn succeed(command: &mut Command) {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{said}", output.status);
}

fn compile(compiler: &str, arguments: &[String], output: &Path) {
    let crate_folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    // Kernels read one memory as many types. And `longjmp` from fibre to fibre is what the fortified one
    // takes for a mistake.
    let options = ["-std=c++20", "-O2", "-pthread", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE"];
    let mut command = Command::new(compiler);
    command.args(options).arg("-I").arg(crate_folder.join("kernels"));
    succeed(command.args(arguments).arg("-o").arg(output));
}

#[test]
fn kernels_are_right_in_whatever_order_their_threads_run() {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    if let Err(error) = Command::new(&compiler).arg("--version").output() {
        return eprintln!("skipped: no C++ compiler, {compiler}: {error}");
    }
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/emulator");
    let source = |name: &str| sources.join(name).with_extension("cpp").display().to_string();
    let built = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let machine = built.join("machine.o");
    compile(&compiler, &["-c".to_owned(), source("machine")], &machine);
    let strips = STRIPS.map(|values| ("strip", STRIP.into_iter().zip(values).collect::<Vec<_>>()));
    let programs: Vec<_> = PROGRAMS
        .into_iter()
        .map(|(name, defines)| (name, defines.to_vec()))
        .chain(strips)
        .collect();
    programs.par_iter().enumerate().for_each(|(i, (name, defines))| {
        let mut arguments: Vec<String> =
            defines.iter().map(|(name, value)| format!("-D{name}={value}")).collect();
        arguments.extend([source(name), machine.display().to_string()]);
        let program = built.join(format!("{name}-{i}"));
        compile(&compiler, &arguments, &program);
        succeed(Command::new(&program).args(SEEDS));
    });
}
