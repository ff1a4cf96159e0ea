// The cards: memory with a limit, counters, failures, and what torch asks of a device.
#include "card.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace card {
namespace {

constexpr size_t kAlignment = 512;  // bytes, as cudaMalloc gives at least
constexpr int kIllegalAddress = 700;  // cudaErrorIllegalAddress
constexpr int64_t kNever = -1;

struct Card {
  std::atomic<int64_t> live{0};
  std::atomic<int64_t> peak{0};
  std::atomic<int64_t> limit{0};
  std::atomic<int64_t> until_broken{kNever};  // operations that still succeed
  Counters counters{};
};

Card cards[kMost];
std::atomic<int> count{0};
thread_local c10::DeviceIndex current_index = 0;

std::mutex pinned_mutex;
std::map<uintptr_t, size_t> pinned;  // address -> bytes

// Memory of a card: its own, or that of a storage which a CPU kernel has made.
struct Block {
  void* memory;
  int64_t size;
  c10::DeviceIndex index;
  c10::Storage host;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  cards[block->index].live -= block->size;
  std::free(block->memory);
  delete block;
}

// Counts memory as taken; throws if a card has no room for it.
void take(int64_t size, c10::DeviceIndex index) {
  Card& card = cards[index];
  const int64_t limit = card.limit;
  const int64_t live = card.live += size;
  if (limit > 0 && live > limit) {
    card.live -= size;
    TORCH_CHECK_WITH(
        OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", size,
        " bytes. GPU ", static_cast<int>(index), " has a total capacity of ", limit,
        " bytes of which ", limit - live + size, " bytes is free.");
  }
  int64_t peak = card.peak;
  while (live > peak && !card.peak.compare_exchange_weak(peak, live)) {
  }
}

struct CardAllocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t size) override {
    const c10::DeviceIndex index = current_index;
    begin(index);
    --counters(index).operations;  // an allocation launches nothing
    take(static_cast<int64_t>(size), index);
    void* memory = nullptr;
    if (size > 0 && posix_memalign(&memory, kAlignment, size) != 0) {
      cards[index].live -= size;
      TORCH_CHECK(false, "no memory of the host for ", size, " bytes of a pretend card");
    }
    auto* block = new Block{memory, static_cast<int64_t>(size), index, {}};
    return {memory, block, &release, c10::Device(kType, index)};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return nullptr;
  }
  void copy_data(void* to, const void* from, size_t size) const override {
    std::memcpy(to, from, size);
  }
  bool initialized() override {
    return true;
  }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex index) override {
    c10::CachingDeviceAllocator::DeviceStats stats;
    for (auto* bytes : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes,
                        &stats.requested_bytes}) {
      (*bytes)[0].current = cards[index].live;  // 0: of all pools
      (*bytes)[0].peak = cards[index].peak;
    }
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex index) override {
    cards[index].peak = cards[index].live.load();
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex index) override {
    const int64_t total = cards[index].limit > 0 ? cards[index].limit.load() : int64_t{1} << 40;
    return {total - cards[index].live, total};
  }
};

CardAllocator card_allocator;
REGISTER_ALLOCATOR(kType, &card_allocator)

void release_pinned(void* memory) {
  std::lock_guard<std::mutex> lock(pinned_mutex);
  pinned.erase(reinterpret_cast<uintptr_t>(memory));
  std::free(memory);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* memory = nullptr;
    TORCH_CHECK(posix_memalign(&memory, kAlignment, size + 1) == 0, "no memory to pin");
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned[reinterpret_cast<uintptr_t>(memory)] = size + 1;
    return {memory, memory, &release_pinned, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &release_pinned;
  }
  void copy_data(void* to, const void* from, size_t size) const override {
    std::memcpy(to, from, size);
  }
};

PinnedAllocator pinned_allocator;

void wait_for(c10::DeviceIndex index) {
  begin(index);
  --counters(index).operations;
  ++counters(index).synchronisations;
}

// Work is done when a call returns, so streams are all the default one and events have happened.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override {
    return kType;
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = current();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override {
    return current();
  }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() < count, "CUDA error: invalid device ordinal");
    uncheckedSetDevice(device);
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.has_index()) current_index = device.index();
  }
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, with_index(device));
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return getStream(device);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return getStream(device);
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    return getStream(device);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return getStream(stream.device());
  }
  // Autograd has a thread for each device that exists when its first backward pass runs.
  c10::DeviceIndex deviceCount() const noexcept override {
    return kMost;
  }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag)
      const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override {
    return true;
  }
  bool queryStream(const c10::Stream&) const override {
    return true;
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    wait_for(stream.device_index());
  }
  void synchronizeEvent(void*) const override {
    wait_for(current_index);
  }
  void synchronizeDevice(const c10::DeviceIndex index) const override {
    wait_for(index < 0 ? current_index : index);
  }
  double elapsedTime(void*, void*, const c10::DeviceIndex) const override {
    return 0;
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return count > 0;
  }
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }
  c10::DeviceIndex deviceCount() const override {
    return static_cast<c10::DeviceIndex>(count.load());
  }
  void setCurrentDevice(c10::DeviceIndex index) const override {
    Guard().setDevice(c10::Device(kType, index));
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return current_index;
  }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    return Guard().exchangeDevice(c10::Device(kType, index)).index();
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override {
    return index < 0 ? current_index : exchangeDevice(index);
  }
  bool isPinnedPtr(const void* data) const override {
    return is_pinned(data);
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    return &pinned_allocator;
  }
  // Random numbers come from the CPU's generators: the same seed draws what a CPU draws.
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::detail::createCPUGenerator();
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    const c10::OptionalDeviceGuard guard(storage.device());
    c10::DataPtr data = card_allocator.allocate(size);
    std::memcpy(data.get(), storage.data(), std::min(size, storage.nbytes()));
    storage.set_data_ptr_noswap(std::move(data));
    storage.set_nbytes(size);
  }
};

}  // namespace

Counters& counters(c10::DeviceIndex index) {
  return cards[index].counters;
}

c10::Device with_index(c10::Device device) {
  return device.has_index() ? device : current();
}

c10::Device current() {
  return {kType, current_index};
}

void begin(c10::DeviceIndex index) {
  Card& card = cards[index];
  if (card.until_broken == 0) {
    throw c10::AcceleratorError(
        {__func__, __FILE__, __LINE__}, kIllegalAddress,
        "CUDA error: an illegal memory access was encountered");
  }
  if (card.until_broken > 0) --card.until_broken;
  ++card.counters.operations;
}

c10::DataPtr adopt(c10::Storage host, c10::DeviceIndex index) {
  const auto size = static_cast<int64_t>(host.nbytes());
  take(size, index);
  void* memory = host.mutable_data();
  auto* block = new Block{nullptr, size, index, std::move(host)};
  return {memory, block, &release, c10::Device(kType, index)};
}

c10::Allocator* allocator() {
  return &card_allocator;
}

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> lock(pinned_mutex);
  const auto address = reinterpret_cast<uintptr_t>(data);
  auto after = pinned.upper_bound(address);
  return after != pinned.begin() && address < (--after)->first + after->second;
}

}  // namespace card

// What device.py calls.
extern "C" {

void card_register() {
  static card::Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
}

int card_most() {
  return card::kMost;
}

void card_set_count(int count) {
  card::count = count;
}

// Bytes that a card has; 0 is no limit.
void card_set_limit(int index, int64_t bytes) {
  card::cards[index].limit = bytes;
}

// Breaks a card after so many operations more; -1 mends it.
void card_break_after(int index, int64_t operations) {
  card::cards[index].until_broken = operations;
}

void card_counters(int index, card::Counters* counters) {
  *counters = card::cards[index].counters;
}

void card_reset_counters(int index) {
  card::cards[index].counters = {};
}
}
