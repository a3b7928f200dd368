// How a test steers the stand-in driver.
#pragma once
#include <stddef.h>
#include <stdint.h>

struct StandinCounts {
  long loads = 0, launches = 0;
  long overlapped = 0;       // launches that may start before the one in front of them ends
  long clusters = 0;         // launches of clusters
  long lookups = 0;          // of kernels by name
  long attributes = 0;       // questions and settings of devices and functions
  long dead_launches = 0;    // of functions that are not of the current context
  long spoilt_captures = 0;  // calls that end a capture in an error
  long allocated = 0;        // pieces of memory that were not given back, in contexts that are alive
  long dead_memory = 0;      // uses of memory that is not of the current context
  long timeouts = 0;         // loads that waited in vain for a launch of another thread
};

extern "C" {
void* standin_create(int place);  // a context at one of four addresses
void standin_destroy(void* context);
void standin_make_current(void* context);  // of this thread
void standin_capture(void* stream, int begin);
void standin_fail_allocations(int number);
void standin_fail_launch(int number);      // this one, counted from 1, fails
void standin_wait_in_load(int wait);       // the next load waits until another thread has launched something
void standin_wait_in_lookup(int wait);     // likewise the next look-up of a kernel that was never looked up
void standin_largest_cluster(int blocks);
void standin_chip(int capability, int ptx_version);  // 90 is 9.0; of the code that a module has for the chip
int standin_has_ids();
long standin_overlapped(const char* kernel);  // launches of this kernel
StandinCounts standin_counts();
}
