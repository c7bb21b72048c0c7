//! `minisgl bench limits`

use anyhow::Result;
use clap::Args;
use minisgl_cpu::limits::{product_rates, read_rate};
use minisgl_cpu::physical_cores;
use serde_json::json;

use crate::cli::out;

/// One array that a large last-level cache holds much of, and one that none does; MiB.
const ARRAYS_MIB: [usize; 2] = [92, 270];

#[derive(Args, Debug)]
pub(super) struct LimitsArgs {
    /// CPU threads [default: all physical cores]
    #[arg(long)]
    threads: Option<usize>,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl LimitsArgs {
    pub(super) fn run(self) -> Result<()> {
        let threads = self.threads.unwrap_or_else(physical_cores).max(1);
        let (mut text, mut reads) = (format!("{threads} threads\n"), Vec::new());
        for mib in ARRAYS_MIB {
            let rate = read_rate(threads, mib << 20)? / 1e9;
            text += &format!("read {mib:>4} MiB  {rate:>9.1} GB/s\n");
            reads.push(json!({"mib": mib, "gb_per_s": rate}));
        }
        let mut products = Vec::new();
        for product in product_rates(threads)? {
            let (dtype, instruction) = (product.dtype, product.instruction);
            let rate = product.ops_per_s / 1e12;
            text += &format!("{dtype:<4} products {rate:>9.3} T/s    {instruction}\n");
            products.push(json!({"dtype": dtype, "instruction": instruction, "tera_per_s": rate}));
        }
        if self.json {
            text = json!({"threads": threads, "reads": reads, "products": products}).to_string();
            text.push('\n');
        }
        out(&text)
    }
}
