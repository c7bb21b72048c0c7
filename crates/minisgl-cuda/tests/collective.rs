//! Sums and gathers over ranks: several on one card through the very kernels that run between
//! cards, NCCL with one rank, cards of their own where there are several, graphs, and what happens
//! when a rank does not come. Skipped, with the reason, where there is no card.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::scope;
use std::time::{Duration, Instant};

use half::bf16;
use minisgl_cuda::{CudaBackend, CudaOptions, GroupOptions, Transport, group};
use minisgl_tensor::*;

/// Ranks that share a card must not share its queues with other tests' ranks.
static CARD: Mutex<()> = Mutex::new(());

fn card(test: &str) -> Option<MutexGuard<'static, ()>> {
    if minisgl_cuda::devices().is_empty() {
        eprintln!("{test}: skipped, no CUDA device on this machine");
        return None;
    }
    Some(CARD.lock().unwrap_or_else(PoisonError::into_inner))
}

struct Rank {
    backend: Arc<CudaBackend>,
    end: Arc<dyn Collective>,
}

/// Ranks on one card.
fn open(ranks: usize, precision: Precision, transport: Transport, seconds: u64) -> Vec<Rank> {
    try_open(&vec![0; ranks], precision, transport, seconds).unwrap()
}

fn try_open(
    cards: &[usize],
    precision: Precision,
    transport: Transport,
    seconds: u64,
) -> Result<Vec<Rank>> {
    let open = |&device| Arc::new(CudaBackend::new(CudaOptions::new(device, precision)).unwrap());
    let backends: Vec<_> = cards.iter().map(open).collect();
    let options = GroupOptions { timeout: Duration::from_secs(seconds), transport };
    let ends = group(&backends, options)?;
    Ok(backends.into_iter().zip(ends).map(|(backend, end)| Rank { backend, end }).collect())
}

impl Rank {
    fn put(&self, dtype: DType, values: &[f32], shape: &[usize]) -> Tensor {
        let tensor = self.backend.alloc(dtype, shape).unwrap();
        self.set(&tensor, values);
        tensor
    }

    fn set(&self, tensor: &Tensor, values: &[f32]) {
        let bytes: Vec<u8> = match tensor.dtype() {
            DType::BF16 => values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
            _ => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        };
        self.backend.upload(&bytes, tensor).unwrap();
    }

    fn get(&self, tensor: &Tensor) -> Result<Vec<f32>> {
        let bytes = self.backend.download(tensor)?.wait()?;
        Ok(match tensor.dtype() {
            DType::BF16 => {
                bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
            }
            _ => bytes
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect(),
        })
    }
}

impl Rank {
    /// A graph in which nothing waits for other ranks.
    fn silent_graph(&self) -> Box<dyn Graph> {
        let x = self.put(self.backend.activation_dtype(), &[0.0; 8], &[8]);
        self.backend.capture(&mut || self.backend.add(&x, &x)).unwrap().unwrap()
    }
}

/// Numbers that a dtype holds exactly, different on every rank and in every round.
fn numbers(count: usize, rank: usize, round: usize, dtype: DType) -> Vec<f32> {
    let seed = (rank * 31 + round * 7 + 1) as u64;
    let number = |i: u64| {
        let mixed = (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_mul(2 * seed + 1) >> 40;
        let x = mixed as f32 / (1 << 23) as f32 - 1.0;
        if dtype == DType::BF16 { bf16::from_f32(x).to_f32() } else { x }
    };
    (0..count as u64).map(number).collect()
}

/// The sum in the order of the ranks, in f32, rounded once: the kernel's very bits.
fn summed(count: usize, ranks: usize, round: usize, dtype: DType) -> Vec<f32> {
    let parts: Vec<_> = (0..ranks).map(|rank| numbers(count, rank, round, dtype)).collect();
    let sum = |i: usize| {
        let total = parts.iter().fold(0.0, |total, part| total + part[i]);
        if dtype == DType::BF16 { bf16::from_f32(total).to_f32() } else { total }
    };
    (0..count).map(sum).collect()
}

#[test]
fn ranks_on_one_card_have_the_same_sums() {
    let Some(_card) = card("sums") else { return };
    for precision in [Precision::Native, Precision::Exact] {
        for ranks in [2, 4] {
            let group = open(ranks, precision, Transport::Peers, 20);
            scope(|threads| {
                for rank in &group {
                    threads.spawn(move || check_sums(rank, Order::OfRanks));
                }
            });
        }
    }
}

/// In which order parts are added.
#[derive(Clone, Copy, PartialEq)]
enum Order {
    OfRanks,
    /// As NCCL likes, which with two ranks makes no difference.
    Any,
}

fn check_sums(rank: &Rank, order: Order) {
    let (dtype, ranks) = (rank.backend.activation_dtype(), rank.end.size());
    // Less than a vector, odd ends, and more than a slot.
    for (round, count) in [1, 7, 8, 4096 + 3, 64 * 5120, (3 << 20) + 5].into_iter().enumerate() {
        let x = rank.put(dtype, &numbers(count, rank.end.rank(), round, dtype), &[count]);
        rank.end.all_reduce(&x).unwrap();
        let (got, want) = (rank.get(&x).unwrap(), summed(count, ranks, round, dtype));
        if order == Order::OfRanks || ranks == 2 {
            assert_eq!(got, want, "{count} elements");
        }
        // Every addition of numbers up to 1 rounds a sum of up to `ranks`.
        let unit = if dtype == DType::BF16 { 2f32.powi(-8) } else { 2f32.powi(-24) };
        let bound = (ranks * ranks) as f32 * unit;
        let far = got.iter().zip(&want).find(|(got, want)| (**got - **want).abs() > bound);
        assert_eq!(far, None, "{count} elements");
    }
}

#[test]
fn ranks_on_one_card_gather_columns() {
    let Some(_card) = card("gathers") else { return };
    for ranks in [2, 3] {
        let group = open(ranks, Precision::Native, Transport::Peers, 20);
        scope(|threads| {
            for rank in &group {
                threads.spawn(move || check_gathers(rank));
            }
        });
    }
}

fn check_gathers(rank: &Rank) {
    let ranks = rank.end.size();
    for (round, (rows, width)) in [(1, 1), (3, 17), (40, 20_001), (1, 76_032)].iter().enumerate() {
        let values = |of: usize| numbers(rows * width, of, round, DType::F32);
        let part = rank.put(DType::F32, &values(rank.end.rank()), &[*rows, *width]);
        let out =
            rank.put(DType::F32, &vec![f32::NAN; rows * width * ranks], &[*rows, width * ranks]);
        rank.end.all_gather_cols(&part, &out).unwrap();
        let parts: Vec<_> = (0..ranks).map(values).collect();
        let row = |row: usize| parts.iter().flat_map(move |part| &part[row * width..][..*width]);
        let want: Vec<f32> = (0..*rows).flat_map(row).copied().collect();
        assert!(rank.get(&out).unwrap() == want, "{rows} rows of {width}");
    }
}

#[test]
fn captured_exchanges_replay() {
    let Some(_card) = card("graphs") else { return };
    let group = open(2, Precision::Native, Transport::Peers, 20);
    scope(|threads| {
        for rank in &group {
            threads.spawn(move || check_graph(rank, 5000));
        }
    });
}

/// Captures two sums and replays them on fresh numbers.
fn check_graph(rank: &Rank, count: usize) {
    let (dtype, ranks) = (rank.backend.activation_dtype(), rank.end.size());
    let [x, y] = [0, 1].map(|_| rank.backend.alloc(dtype, &[count]).unwrap());
    let mut sums = || rank.end.all_reduce(&x).and_then(|()| rank.end.all_reduce(&y));
    let graph = rank.backend.capture(&mut sums).unwrap().unwrap();
    // Page-locked memory for downloads is made now: later that could stall the card for both ranks.
    rank.get(&x).unwrap();
    for round in 0..6 {
        rank.set(&x, &numbers(count, rank.end.rank(), round, dtype));
        rank.set(&y, &numbers(count, rank.end.rank(), round + 100, dtype));
        graph.launch().unwrap();
        assert_eq!(rank.get(&x).unwrap(), summed(count, ranks, round, dtype), "round {round}");
        assert_eq!(rank.get(&y).unwrap(), summed(count, ranks, round + 100, dtype));
    }
}

#[test]
fn nccl_sums_and_gathers_in_graphs_and_outside() {
    let Some(_card) = card("NCCL") else { return };
    for precision in [Precision::Native, Precision::Exact] {
        let rank = match try_open(&[0], precision, Transport::Nccl, 60) {
            Ok(mut ranks) => ranks.remove(0),
            Err(error) if error.to_string().contains("was not found") => {
                return eprintln!("NCCL: skipped, {error}");
            }
            Err(error) => panic!("{error}"),
        };
        check_sums(&rank, Order::OfRanks);
        check_gathers(&rank);
        check_graph(&rank, 100_000);
    }
}

#[test]
fn cards_of_their_own_sum_and_gather() {
    let Some(_card) = card("several cards") else { return };
    let cards = minisgl_cuda::devices().len();
    if cards < 2 {
        return eprintln!("several cards: skipped, one CUDA device on this machine");
    }
    for ranks in [2, 4, 8].into_iter().filter(|ranks| *ranks <= cards) {
        for transport in [Transport::Peers, Transport::Nccl, Transport::Auto] {
            let cards: Vec<usize> = (0..ranks).collect();
            let group = match try_open(&cards, Precision::Native, transport, 60) {
                Ok(group) => group,
                Err(error) => {
                    let error = error.to_string();
                    let missing = ["was not found", "do not all read"];
                    assert!(missing.iter().any(|why| error.contains(why)), "{error}");
                    eprintln!("{ranks} cards through {transport:?}: skipped, {error}");
                    continue;
                }
            };
            let order = if transport == Transport::Peers { Order::OfRanks } else { Order::Any };
            scope(|threads| {
                for rank in &group {
                    threads.spawn(move || {
                        check_sums(rank, order);
                        check_gathers(rank);
                        // Through the mailboxes and through NCCL, where there is a choice.
                        if order == Order::OfRanks || ranks == 2 {
                            check_graph(rank, 5000);
                            check_graph(rank, 3 << 20);
                        }
                    });
                }
            });
            eprintln!("{ranks} cards through {transport:?}: sums, gathers, graphs");
        }
    }
}

#[test]
fn a_rank_that_is_late_ends_the_group() {
    let Some(_card) = card("late ranks") else { return };
    // On the host, where ranks on one card meet before they enqueue.
    let ranks = open(2, Precision::Native, Transport::Peers, 1);
    let x = ranks[0].put(DType::BF16, &[1.0; 8], &[8]);
    let start = Instant::now();
    let error = ranks[0].end.all_reduce(&x).unwrap_err().to_string();
    assert!(error.contains("not all ranks came") && start.elapsed().as_secs() < 10, "{error}");
    let error = ranks[1].end.all_reduce(&x).unwrap_err().to_string();
    assert!(error.contains("not all ranks came"), "{error}");
    drop(ranks);
    // On the device: rank 1's graph exchanges nothing, and rank 0's kernel itself gives up.
    let ranks = open(2, Precision::Native, Transport::Peers, 1);
    let x = ranks[0].put(DType::BF16, &[1.0; 8], &[8]);
    let graph = ranks[0].backend.capture(&mut || ranks[0].end.all_reduce(&x)).unwrap().unwrap();
    let silent = ranks[1].silent_graph();
    let start = Instant::now();
    scope(|threads| {
        threads.spawn(move || silent.launch().unwrap());
        graph.launch().unwrap();
    });
    let error = ranks[0].get(&x).unwrap_err().to_string();
    assert!(start.elapsed().as_secs() < 10, "{error} after {:?}", start.elapsed());
    assert!(error.contains("rank 1 did not come") || error.contains("not done"), "{error}");
}

#[test]
fn a_rank_that_is_gone_lets_go_of_those_that_wait() {
    let Some(_card) = card("lost ranks") else { return };
    let mut ranks = open(2, Precision::Native, Transport::Peers, 60);
    let gone = ranks.pop().unwrap();
    let rank = ranks.pop().unwrap();
    let x = rank.put(DType::BF16, &[1.0; 8], &[8]);
    let graph = rank.backend.capture(&mut || rank.end.all_reduce(&x)).unwrap().unwrap();
    let silent = gone.silent_graph();
    let start = Instant::now();
    scope(|threads| {
        threads.spawn(move || {
            silent.launch().unwrap();
            std::thread::sleep(Duration::from_millis(300));
            drop(gone);
        });
        graph.launch().unwrap();
        let error = rank.get(&x).unwrap_err().to_string();
        assert!(error.contains("rank 1 has ended"), "{error}");
        assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
    });
    assert!(rank.end.all_reduce(&x).is_err());
}
