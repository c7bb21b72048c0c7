// A place in a ring of stages, and the parity of its phase. Divisions would cost more than a step does.
struct Ring {
    int stages;
    u32 stage = 0, parity = 0;
    __device__ explicit Ring(int stages) : stages(stages) {}
    __device__ void next() {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
};
