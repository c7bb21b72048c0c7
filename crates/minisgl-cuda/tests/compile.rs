//! Every kernel compiles for every architecture that the project serves, and the hot ones keep
//! their registers. Needs NVRTC (`pip install nvidia-cuda-nvrtc`), no card.

use minisgl_cuda::{Module, compile};

#[test]
fn kernels_compile_without_spills() {
    if let Err(error) = compile(Module::Elementwise, &[], "sm_80", false) {
        assert!(error.to_string().contains("was not found"), "{error}");
        eprintln!("skipped: {error}");
        return;
    }
    for arch in ["sm_80", "sm_90a", "sm_100"] {
        for exact in [false, true] {
            for module in [Module::Elementwise, Module::Sample, Module::Moe] {
                // The sampler's one block a row waits for memory, not for its few spilled bytes.
                check(module, &[], arch, exact, module != Module::Sample);
            }
            for ranks in [2, 4, 8] {
                check(Module::Collective, &[("RANKS", ranks)], arch, exact, true);
            }
            for dim in [64, 80, 96, 128, 256] {
                for decode in [0, 1] {
                    // Heads of 256 do not fit the registers of this kernel yet.
                    check(
                        Module::Attention,
                        &[("DIM", dim), ("DECODE", decode)],
                        arch,
                        exact,
                        dim < 256,
                    );
                }
            }
        }
        // Whose products of four warps no other architecture takes.
        for groups in [1, 2] {
            for (rows, gated, norm) in [(64, 0, 0), (32, 0, 0), (32, 0, 1), (32, 1, 1), (32, 1, 0)]
            {
                let defines =
                    [("ROWS", rows), ("GROUPS", groups), ("GATED", gated), ("NORM", norm)];
                if arch == "sm_90a" {
                    check(Module::Narrow, &defines, arch, false, true);
                } else {
                    let refused = compile(Module::Narrow, &defines, arch, false).unwrap_err();
                    assert!(refused.to_string().contains("wgmma"), "{arch}: {refused}");
                }
            }
        }
        if arch == "sm_90a" {
            strips_compile_without_spills();
        }
        for rows in [64, 128].into_iter().filter(|_| arch == "sm_90a") {
            check(Module::Head, &[("ROWS", rows)], arch, false, true);
        }
        for (dim, group) in
            [(64, 1), (64, 7), (128, 2), (128, 5)].into_iter().filter(|_| arch == "sm_90a")
        {
            for soft_cap in [0, 1] {
                let defines = [("DIM", dim), ("GROUP", group), ("SOFT_CAP", soft_cap)];
                check(Module::Prefill, &defines, arch, false, true);
            }
        }
        for dim in [64, 128, 256].into_iter().filter(|_| arch != "sm_80") {
            let variants = [(1, 0, 0), (2, 0, 0), (1, 1, 0), (2, 1, 0), (2, 0, 1), (2, 1, 1)];
            for (halves, soft_cap, cascade) in variants {
                // More than 8 query heads of 256 spill.
                let defines = [
                    ("DIM", dim),
                    ("HALVES", halves),
                    ("SOFT_CAP", soft_cap),
                    ("CASCADE", cascade),
                ];
                check(Module::Decode, &defines, arch, false, dim < 256 || halves == 1);
            }
        }
        for (dim, group) in
            [(128, 2), (64, 2), (128, 6), (64, 10)].into_iter().filter(|_| arch != "sm_80")
        {
            let defines = [
                ("CLUSTER", 8),
                ("DIM", dim),
                ("GROUP", group),
                ("HALVES", (group + 7) / 8),
                ("FIRST", (group + 2) * dim / 128),
                ("SECOND", 8),
                ("LATE", 18),
                ("SOFT_CAP", 0),
            ];
            check(Module::Attend, &defines, arch, false, true);
        }
        for (first, second) in [(3, 4), (7, 8), (8, 4)].into_iter().filter(|_| arch != "sm_80") {
            let defines = [("CLUSTER", 8), ("FIRST", first), ("SECOND", second)];
            check(Module::Mlp, &defines, arch, false, true);
        }
        for tiles in [1, 2].into_iter().filter(|_| arch != "sm_80") {
            for (halves, gated, norm) in [(1, 0, 0), (2, 0, 1), (1, 1, 1), (2, 1, 1)] {
                let defines = [
                    ("HALVES", halves),
                    ("GATED", gated),
                    ("NORM", norm),
                    ("OUT_F32", 0),
                    ("TILES", if gated == 1 { 2 } else { tiles }),
                ];
                check(Module::Stream, &defines, arch, false, true);
            }
        }
        for halves in [1, 2] {
            for (gated, norm) in [(0, 0), (0, 1), (1, 1)] {
                let defines =
                    [("HALVES", halves), ("GATED", gated), ("NORM", norm), ("OUT_F32", 0)];
                check(Module::Gemv, &defines, arch, false, true);
            }
        }
        for (gated, norm) in [(0, 0), (0, 1), (1, 1)].into_iter().filter(|_| arch != "sm_80") {
            for (stages, out_f32) in [(8, 0), (10, 0), (12, 0), (16, 0), (16, 1)] {
                let defines =
                    [("GATED", gated), ("NORM", norm), ("OUT_F32", out_f32), ("STAGES", stages)];
                check(Module::Wide, &defines, arch, false, true);
            }
        }
    }
    // As a race checker follows them.
    let product = [("GATED", 1), ("NORM", 1), ("OUT_F32", 0)];
    for (module, defines, others) in [
        (
            Module::Decode,
            &[("DIM", 128), ("SOFT_CAP", 0)][..],
            &[("HALVES", 2), ("CASCADE", 1)][..],
        ),
        (Module::Head, &[], &[("ROWS", 64)]),
        (Module::Narrow, &product[..2], &[("ROWS", 32), ("GROUPS", 1)]),
        (Module::Prefill, &[("DIM", 128)], &[("GROUP", 2), ("SOFT_CAP", 0)]),
        (Module::Stream, &product, &[("HALVES", 2), ("TILES", 2)]),
        (Module::Strip, &product[..2], &[("X_ROWS", 32), ("UNITS", 5), ("BLOCKS", 2)]),
        (Module::StripShort, &product[..2], &[("X_ROWS", 64), ("UNITS", 3), ("BLOCKS", 1)]),
        (Module::StripTall, &product[..2], &[("X_ROWS", 128), ("UNITS", 3), ("BLOCKS", 2)]),
        (Module::Wide, &product, &[("STAGES", 10)]),
    ] {
        let defines = [defines, others, &[("RACE_CHECKED", 1)]].concat();
        check(module, &defines, "sm_90a", false, false);
    }
}

fn strips_compile_without_spills() {
    let strips = [
        (17, 1, 1, 1),
        (18, 1, 1, 1),
        (18, 1, 0, 0),
        (2, 1, 0, 1),
        (7, 2, 0, 1),
        (18, 2, 1, 1),
        (5, 2, 0, 0),
        (11, 4, 0, 0),
        (15, 4, 0, 1),
        (18, 4, 0, 0),
        (18, 4, 1, 1),
    ];
    let short = [(2, 1, 0, 1), (3, 1, 1, 1), (8, 1, 1, 1), (8, 1, 0, 0)];
    let tall = [
        (3, 1, 1, 1),
        (4, 1, 0, 1),
        (8, 1, 1, 1),
        (3, 4, 0, 0),
        (4, 2, 0, 1),
        (8, 2, 1, 1),
        (8, 4, 0, 1),
    ];
    for (module, rows, variants) in [
        (Module::Strip, 32, &strips[..]),
        (Module::Strip, 64, &strips),
        (Module::StripShort, 64, &short),
        (Module::StripTall, 128, &tall),
    ] {
        for &(units, blocks, gated, norm) in variants {
            let defines = [
                ("X_ROWS", rows),
                ("UNITS", units),
                ("BLOCKS", blocks),
                ("GATED", gated),
                ("NORM", norm),
            ];
            check(module, &defines, "sm_90a", false, true);
        }
    }
}

/// A hot kernel stores no registers to memory.
fn check(module: Module, defines: &[(&'static str, i32)], arch: &str, exact: bool, hot: bool) {
    let (cubin, report) = compile(module, defines, arch, exact).unwrap();
    assert!(!cubin.is_empty());
    if !hot {
        return;
    }
    let mut lines = 0;
    for line in report.lines() {
        let Some((before, _)) = line.split_once(" bytes spill stores") else { continue };
        let bytes: u32 = before.rsplit(' ').next().unwrap().parse().unwrap();
        assert_eq!(bytes, 0, "{module:?} {defines:?} {arch}: {line}");
        lines += 1;
    }
    assert!(lines > 0, "ptxas says nothing of spills: {report}");
    // Which ptxas says where it has products of four warps wait for one another.
    let serial = report.lines().find(|line| line.contains("are serialized"));
    assert!(serial.is_none(), "{module:?} {defines:?} {arch}: {serial:?}");
}
