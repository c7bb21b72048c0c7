//! Ranks of the reference.

use std::sync::{Arc, Barrier, Mutex};

use minisgl_tensor::*;

use super::Reference;

/// A group of ranks that meet at a barrier and sum in rank order.
pub struct Group {
    rank: usize,
    backend: Arc<Reference>,
    shared: Arc<Meeting>,
}

struct Meeting {
    barrier: Barrier,
    parts: Vec<Mutex<Vec<f32>>>,
}

pub fn group(size: usize) -> Vec<(Arc<Reference>, Arc<dyn Collective>)> {
    let parts = (0..size).map(|_| Mutex::default()).collect();
    let shared = Arc::new(Meeting { barrier: Barrier::new(size), parts });
    (0..size)
        .map(|rank| {
            let backend = Arc::new(Reference::default());
            let shared = Arc::clone(&shared);
            let group = Group { rank, backend: Arc::clone(&backend), shared };
            (backend, Arc::new(group) as Arc<dyn Collective>)
        })
        .collect()
}

impl Group {
    fn exchange(&self, mine: Vec<f32>) -> Vec<Vec<f32>> {
        *self.shared.parts[self.rank].lock().unwrap() = mine;
        self.shared.barrier.wait();
        let all = self.shared.parts.iter().map(|part| part.lock().unwrap().clone()).collect();
        self.shared.barrier.wait();
        all
    }
}

impl Collective for Group {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.shared.parts.len()
    }

    fn all_reduce(&self, tensor: &Tensor) -> Result<()> {
        let all = self.exchange(self.backend.f(tensor));
        let sum: Vec<f32> =
            (0..tensor.elements()).map(|i| all.iter().map(|part| part[i]).sum()).collect();
        self.backend.put_f(tensor, &sum);
        Ok(())
    }

    fn all_gather_cols(&self, part: &Tensor, out: &Tensor) -> Result<()> {
        let (rows, n) = (part.dim(0), part.dim(1));
        let all = self.exchange(self.backend.f(part));
        let whole: Vec<f32> = (0..rows)
            .flat_map(|row| all.iter().flat_map(move |part| part[row * n..][..n].to_vec()))
            .collect();
        self.backend.put_f(out, &whole);
        Ok(())
    }
}
