// Runs what casts weights in a product, as one CTA: the producer of weights, the casting warps, and
// a warp in the place of the consumers that writes down every tile it is given.
#pragma once

#include "rhs_cast.cuh"

namespace fp8gemm {

constexpr int kConsumerWarp = kCastWarps, kProducerWarp = kConsumerWarp + 1;
using Shared = SharedMemory<kSpec>;

struct Results {
  uint8_t* values;  // [steps of all blocks, 128 rows of rhs, 128 of k]
  float* scales;    // [steps of all blocks]
  int32_t* blocks;  // [steps of all blocks, 3]: group, first row of rhs, step
  int capacity, count;
};

static GemmParams params;
static Results results;

static void write_down(const Shared& shared, const Block& block, int index, int stage) {
  if (results.count == results.capacity) return emulation::fail("more steps than expected");
  const int at = results.count++;
  const int32_t where[] = {block.group, block.n, index};
  std::memcpy(results.blocks + 3 * at, where, sizeof where);
  std::memcpy(results.scales + at, shared.rhs_scale[stage], 4);
  for (int n = 0; n < 128; ++n) {
    for (int k = 0; k < 128; ++k) {
      const int unit = n / 8 * CoreMatrices::kStride + k / 16 * CoreMatrices::kLeading + n % 8;
      results.values[(at * 128 + n) * 128 + k] = shared.rhs[stage][16 * unit + k % 16];
    }
  }
}

static void consume(Shared& shared) {
  RingPosition<kSpec.stages> at{0, 0};
  Scheduler<kSpec> scheduler(params, 0, 1, 0);
  for (; !scheduler.done(); scheduler.next()) {
    const Block block = scheduler.block();
    const int steps = block.steps > 0 ? taken_steps(block.steps) : 1;
    for (int index = 0; index < steps; ++index, at.advance()) {
      mbarrier_try_wait(&shared.cast.ready[at.stage], at.parity);
      if (elect_sync()) {
        if (block.steps > 0) write_down(shared, block, index, at.stage);
        mbarrier_arrive(&shared.empty[at.stage]);
      }
    }
  }
}

static void thread() {
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  const int warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    init_cast_barriers(shared.cast);
    for (uint64_t& barrier : shared.empty) mbarrier_init(&barrier, 1);
  }
  __syncthreads();
  if (warp < kCastWarps) {
    Caster<kSpec, Shared>(shared, warp).run();
  } else if (warp == kConsumerWarp) {
    consume(shared);
  } else {
    produce_bf16<kSpec>(params, shared);
  }
}

}  // namespace fp8gemm

// rhs of g matrices [rows, columns], in one array or two. Returns what went wrong, or "".
extern "C" __attribute__((visibility("default"))) const char* launch(
    const uint16_t* left, const uint16_t* right, int g, int rows, int columns, int m, int n, int k,
    const int32_t* sizes, fp8gemm::Results* results, int reversed) {
  using namespace fp8gemm;
  params = {};
  reinterpret_cast<Matrices&>(params.rhs) = {left, columns, rows, g};
  reinterpret_cast<Matrices&>(params.rhs_right) = {right, columns, rows, g};
  params.left_columns = left == right ? 0x7fffffff : columns;
  params.m = m, params.n = n, params.k = k, params.groups = g, params.group_data = sizes;
  fp8gemm::results = *results;
  std::memset(dynamic_shared(), 0xff, sizeof(Shared));
  emulation::failure[0] = 0;
  emulation::body = [] { thread(); };
  emulation::threads = 32 * (kProducerWarp + 1);
  emulation::grid = {1, 1, 1}, emulation::block_index = {0, 0, 0};
  emulation::run_block(reversed);
  results->count = fp8gemm::results.count;
  return emulation::failure;
}
