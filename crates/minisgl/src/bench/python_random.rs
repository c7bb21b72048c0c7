//! Python's `random.seed` and `random.randint`, so that a benchmark draws what the reference
//! draws: MT19937 (Matsumoto and Nishimura, 1998) behind CPython's way of seeding and of
//! rejecting.

const N: usize = 624;
const M: usize = 397;

/// Python's `random.Random`.
pub struct PythonRandom {
    state: [u32; N],
    next: usize,
}

impl PythonRandom {
    /// `random.seed(seed)`.
    pub fn new(seed: u64) -> Self {
        let mut key = vec![seed as u32];
        if seed > u64::from(u32::MAX) {
            key.push((seed >> 32) as u32);
        }
        let mut random = Self { state: first_state(19_650_218), next: N };
        random.mix_in(&key);
        random
    }

    /// `random.randint(low, high)`: both ends can come.
    pub fn randint(&mut self, low: u32, high: u32) -> u32 {
        assert!(low <= high, "an empty range");
        let choices = u64::from(high - low) + 1;
        let bits = 64 - choices.leading_zeros();
        assert!(bits <= 32, "a draw has at most 32 bits");
        loop {
            let drawn = self.next_u32() >> (32 - bits);
            if u64::from(drawn) < choices {
                return low + drawn;
            }
        }
    }

    /// `init_by_array` of the reference implementation.
    fn mix_in(&mut self, key: &[u32]) {
        let state = &mut self.state;
        let mut i = 1;
        let scrambled = |state: &[u32; N], i: usize| state[i - 1] ^ (state[i - 1] >> 30);
        for k in 0..N.max(key.len()) {
            let j = k % key.len();
            state[i] = (state[i] ^ scrambled(state, i).wrapping_mul(1_664_525))
                .wrapping_add(key[j])
                .wrapping_add(j as u32);
            i = advance(state, i);
        }
        for _ in 1..N {
            state[i] =
                (state[i] ^ scrambled(state, i).wrapping_mul(1_566_083_941)).wrapping_sub(i as u32);
            i = advance(state, i);
        }
        state[0] = 0x8000_0000;
    }

    fn next_u32(&mut self) -> u32 {
        if self.next == N {
            self.twist();
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    fn twist(&mut self) {
        for i in 0..N {
            let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % N] & 0x7fff_ffff);
            let odd = if y & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[i] = self.state[(i + M) % N] ^ (y >> 1) ^ odd;
        }
        self.next = 0;
    }
}

fn first_state(seed: u32) -> [u32; N] {
    let mut state = [seed; N];
    for i in 1..N {
        let before = state[i - 1];
        state[i] = (before ^ (before >> 30)).wrapping_mul(1_812_433_253).wrapping_add(i as u32);
    }
    state
}

/// Behind the last word follows the second, and the first becomes what the last was.
fn advance(state: &mut [u32; N], i: usize) -> usize {
    if i + 1 == N {
        state[0] = state[N - 1];
        1
    } else {
        i + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_what_python_draws() {
        // random.seed(0); [random.randint(0, 10000) for _ in range(9)], Python 3.11
        let mut random = PythonRandom::new(0);
        assert_eq!(random.randint(100, 1024), 964);
        let drawn: Vec<u32> = (0..8).map(|_| random.randint(0, 10_000)).collect();
        assert_eq!(drawn, [6311, 6890, 663, 4242, 8376, 7961, 6634, 4969]);
    }
}
