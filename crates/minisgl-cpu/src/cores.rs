//! Which processor cores there are, and keeping threads on them. Only Linux tells; elsewhere threads
//! run where the system puts them.

use std::thread;

/// Processor cores that this process may use, hyper-threads of one core counted once where the
/// system tells (Linux).
pub fn physical_cores() -> usize {
    match cores().len() {
        0 => thread::available_parallelism().map_or(1, usize::from),
        count => count.min(thread::available_parallelism().map_or(count, usize::from)),
    }
}

/// The cores of rank `rank` of `ranks`: as many for each, side by side, so that a rank stays on its
/// NUMA node wherever there are as many ranks as nodes, or a multiple of that. Empty where there are
/// fewer cores than ranks, or the system does not tell.
pub fn cores_of(rank: usize, ranks: usize) -> Vec<usize> {
    let cores = cores();
    let each = cores.len() / ranks;
    cores[rank * each..(rank + 1) * each].to_vec()
}

/// A logical processor of each core that this process may use, those of a NUMA node side by side.
fn cores() -> Vec<usize> {
    let read = |path: String| std::fs::read_to_string(path).ok();
    let node = |node: usize| read(format!("/sys/devices/system/node/node{node}/cpulist"));
    let siblings = |cpu: usize| {
        read(format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"))
    };
    let is_first = |cpu: usize, allowed: &[usize]| match siblings(cpu) {
        Some(list) => numbers(&list).find(|sibling| allowed.contains(sibling)) == Some(cpu),
        None => true,
    };
    let allowed = allowed();
    let mut cores: Vec<usize> = (0..)
        .map_while(node)
        .flat_map(|list| numbers(&list).collect::<Vec<_>>())
        .filter(|cpu| allowed.contains(cpu))
        .collect();
    if cores.is_empty() {
        cores.clone_from(&allowed);
    }
    cores.retain(|cpu| is_first(*cpu, &allowed));
    cores
}

/// What a list such as `0-3,8` names.
fn numbers(list: &str) -> impl Iterator<Item = usize> {
    list.trim().split(',').flat_map(|part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        match (first.parse::<usize>(), last.parse::<usize>()) {
            (Ok(first), Ok(last)) => first..last + 1,
            _ => 0..0,
        }
    })
}

/// The logical processors that this process may use.
#[cfg(target_os = "linux")]
fn allowed() -> Vec<usize> {
    use rustix::thread::{CpuSet, sched_getaffinity};
    match sched_getaffinity(None) {
        Ok(set) => (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect(),
        Err(_) => Vec::new(),
    }
}

#[cfg(not(target_os = "linux"))]
fn allowed() -> Vec<usize> {
    Vec::new()
}

/// Keeps the calling thread on a logical processor. That is for speed alone: where the system
/// refuses, the thread runs as well.
#[cfg(target_os = "linux")]
pub(crate) fn stay_on(cpu: usize) {
    let mut set = rustix::thread::CpuSet::new();
    set.set(cpu);
    let _ = rustix::thread::sched_setaffinity(None, &set);
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn stay_on(_cpu: usize) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_processors_are_read() {
        let read = |list| numbers(list).collect::<Vec<_>>();
        assert_eq!(read("0-3,8,10-11\n"), [0, 1, 2, 3, 8, 10, 11]);
        assert_eq!(read("5"), [5]);
        assert_eq!(read("\n"), []);
    }

    #[test]
    fn ranks_share_no_core_and_leave_none_that_would_do_for_all() {
        let all = cores();
        for ranks in 1..=all.len() + 1 {
            let mut dealt: Vec<usize> = (0..ranks).flat_map(|rank| cores_of(rank, ranks)).collect();
            assert_eq!(dealt.len(), all.len() / ranks * ranks);
            dealt.sort_unstable();
            dealt.dedup();
            assert_eq!(dealt.len(), all.len() / ranks * ranks, "a core was dealt twice");
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_thread_stays_where_it_is_put() {
        for cpu in cores() {
            let seen = thread::spawn(move || {
                stay_on(cpu);
                allowed()
            });
            assert_eq!(seen.join().unwrap(), [cpu]);
        }
    }
}
