// How a test steers the stand-in driver.
#pragma once
#include <stddef.h>
#include <stdint.h>

struct StandinCounts {
  long loads = 0, launches = 0;
  long dead_launches = 0;    // of functions that are not of the current context
  long spoilt_captures = 0;  // calls that end a capture in an error
  long allocated = 0;        // pieces of memory that were not given back
  long timeouts = 0;         // loads that waited in vain for a launch of another thread
};

extern "C" {
void* standin_create(int place);  // a context at one of four addresses
void standin_destroy(void* context);
void standin_make_current(void* context);  // of this thread
void standin_capture(void* stream, int begin);
void standin_fail_allocations(int number);
void standin_wait_in_load(int wait);  // the next load waits until another thread has launched something
StandinCounts standin_counts();
}
