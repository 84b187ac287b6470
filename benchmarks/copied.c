/* Counts the bytes that a process copies in pieces of 1 KiB or more: a library to preload, for counted.py.

   It stands in front of the C library's copying functions. Copies that the kernel makes are not counted, nor is the
   masking of WebSocket frames, which is a loop of its own. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>

enum { LEAST = 1024 }; /* smaller ones move objects, not payload */

typedef void *(*Copy)(void *, const void *, size_t);

unsigned long long copied_bytes;

static Copy move;

__attribute__((constructor)) static void find(void) { move = (Copy)dlsym(RTLD_NEXT, "memmove"); }

/* For what is copied before `find` has run. */
static void *copy_slowly(void *to, const void *from, size_t size) {
  volatile char *target = to;
  const volatile char *source = from;
  if (target < source)
    for (size_t i = 0; i < size; i++) target[i] = source[i];
  else
    while (size--) target[size] = source[size];
  return to;
}

void *memmove(void *to, const void *from, size_t size) {
  if (size >= LEAST) __atomic_fetch_add(&copied_bytes, size, __ATOMIC_RELAXED);
  return move ? move(to, from, size) : copy_slowly(to, from, size);
}

void *memcpy(void *to, const void *from, size_t size) { return memmove(to, from, size); }

/* What a compiler calls instead with _FORTIFY_SOURCE. To check `room` is not the task of a benchmark. */
void *__memmove_chk(void *to, const void *from, size_t size, size_t room) {
  (void)room;
  return memmove(to, from, size);
}

void *__memcpy_chk(void *to, const void *from, size_t size, size_t room) {
  (void)room;
  return memmove(to, from, size);
}
