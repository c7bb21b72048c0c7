//! Times sums over ranks by message size, in decode graphs: over peer memory and through NCCL.
//! `exchange [RANKS] [--json]`, a GPU a rank.
#![expect(clippy::print_stdout, reason = "this program's output is its table")]

use std::sync::Arc;
use std::thread::scope;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use minisgl_cuda::{CudaBackend, CudaOptions, GroupOptions, Transport, group};
use minisgl_tensor::*;

const BYTES_MIN: usize = 2 << 10;
const BYTES_MAX: usize = 8 << 20;
/// Sums in a graph: as many as a step of a large model takes.
const SUMS: usize = 100;
const LAUNCHES: usize = 5;
const REPEATS: usize = 7;

/// Microseconds of one sum of each size, or why there are none.
type Times = Result<Vec<f64>>;

fn main() -> Result<()> {
    for (name, value) in [("NCCL_NVLS_ENABLE", "0"), ("NCCL_RUNTIME_CONNECT", "0")] {
        // SAFETY: this is the program's start, nobody else reads the environment yet.
        unsafe { std::env::set_var(name, value) };
    }
    let args: Vec<String> = std::env::args().skip(1).collect();
    let ranks = args.iter().find_map(|arg| arg.parse().ok()).unwrap_or(2);
    let sizes: Vec<usize> = std::iter::successors(Some(BYTES_MIN), |bytes| Some(bytes * 2))
        .take_while(|bytes| *bytes <= BYTES_MAX)
        .collect();
    let [peers, nccl] = [Transport::Peers, Transport::Nccl].map(|way| times(ranks, way, &sizes));
    if args.iter().any(|arg| arg == "--json") {
        println!(
            "{{\"ranks\": {ranks}, \"bytes\": {sizes:?}, \"peers_us\": {}, \"nccl_us\": {}}}",
            json(&peers),
            json(&nccl)
        );
        return Ok(());
    }
    println!("{:>9}  {:>9}  {:>9}   µs a sum over {ranks} ranks", "bytes", "peers", "NCCL");
    for (index, bytes) in sizes.iter().enumerate() {
        let [peers, nccl] = [&peers, &nccl].map(|times| match times {
            Ok(times) => format!("{:.2}", times[index]),
            Err(_) => "-".to_owned(),
        });
        println!("{bytes:>9}  {peers:>9}  {nccl:>9}");
    }
    for error in [peers, nccl].into_iter().filter_map(Result::err) {
        println!("{error:#}");
    }
    Ok(())
}

fn json(times: &Times) -> String {
    match times {
        Ok(times) => format!("{times:.2?}"),
        Err(error) => format!("{:?}", error.to_string()),
    }
}

fn times(ranks: usize, transport: Transport, sizes: &[usize]) -> Times {
    let open = |device| CudaBackend::new(CudaOptions::new(device, Precision::Native)).map(Arc::new);
    let backends = (0..ranks).map(open).collect::<minisgl_tensor::Result<Vec<_>>>()?;
    let options = GroupOptions { timeout: Duration::from_secs(30), transport };
    let ends = group(&backends, options).with_context(|| format!("{transport:?}"))?;
    // An end that is dropped ends the group, so all of them live until all threads are done.
    scope(|threads| {
        let run = |(backend, end): (&Arc<CudaBackend>, &Arc<dyn Collective>)| {
            let (backend, end) = (Arc::clone(backend), Arc::clone(end));
            threads
                .spawn(move || sizes.iter().map(|bytes| time(&*backend, &*end, *bytes)).collect())
        };
        let ranks: Vec<_> = backends.iter().zip(&ends).map(run).collect();
        let times = ranks.into_iter().map(|rank| rank.join().expect("a rank panicked"));
        times.collect::<Result<Vec<Vec<f64>>>>().map(|mut times| times.swap_remove(0))
    })
    .with_context(|| format!("{transport:?}"))
}

/// Microseconds of one sum: the median of some lots, each of several graphs behind one another.
fn time(backend: &dyn Backend, end: &dyn Collective, bytes: usize) -> Result<f64> {
    let x = backend.alloc(DType::BF16, &[bytes / 2])?;
    let mut sums = || (0..SUMS).try_for_each(|_| end.all_reduce(&x));
    let graph = backend.capture(&mut sums)?.context("CUDA has graphs")?;
    let mut times = [0.0; REPEATS];
    for time in &mut times {
        // All ranks begin together.
        end.all_reduce(&x)?;
        backend.synchronize()?;
        let start = Instant::now();
        (0..LAUNCHES).try_for_each(|_| graph.launch())?;
        backend.synchronize()?;
        *time = start.elapsed().as_secs_f64() * 1e6 / (LAUNCHES * SUMS) as f64;
    }
    times.sort_by(f64::total_cmp);
    Ok(times[REPEATS / 2])
}
