// A pretend accelerator for tests: several cards, whose memory is ordinary memory.
//
// card.cpp has the cards: their memory, counters, failures, and what torch asks of a device.
// operators.cpp runs torch's operators on them, by the CPU's kernels on the cards' own memory.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/Storage.h>

#include <cstdint>

namespace card {

// Autograd starts one thread for each, so this is a constant; the number in use is a setting.
constexpr int kMost = 4;
constexpr c10::DeviceType kType = c10::DeviceType::PrivateUse1;

// What a card has done since its counters were reset.
struct Counters {
  int64_t operations;        // kernels that a card would have launched, copies included
  int64_t host_to_device;    // bytes
  int64_t device_to_host;    // bytes
  int64_t synchronisations;  // times the host would have waited for the card
};

Counters& counters(c10::DeviceIndex index);

// A device with an index: the current card where none is given.
c10::Device with_index(c10::Device device);
c10::Device current();

// Begins an operation on a card. Throws c10::AcceleratorError once the card is broken.
void begin(c10::DeviceIndex index);

// Makes memory that a CPU kernel has allocated the memory of a card, without a copy.
// Throws c10::OutOfMemoryError if it exceeds the card's limit.
c10::DataPtr adopt(c10::Storage host, c10::DeviceIndex index);

// The cards' memory, on the current card; and host memory that copies need not wait for.
c10::Allocator* allocator();
bool is_pinned(const void* data);

}  // namespace card
