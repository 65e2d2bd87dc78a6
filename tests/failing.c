// Preloaded into a process under test: makes the n-th call fail that writes below a folder, and perhaps all after it.
//   cc -shared -fPIC -O1 -o failing.so failing.c -ldl
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[4096];
static int number, persist;
static long at, own, *count = &own;
static char *what, nowhere[4096];

// folder: absolute.  failure: errno.  nth: which call fails, from 1 (0: none).  after: all later calls too.
// shared: where calls are counted.  told: 4096 bytes, gets the call that failed first.
void starve(const char *folder, int failure, long nth, int after, long *shared, char *told) {
  strncpy(root, folder, sizeof root - 1);
  number = failure, at = nth, persist = after, count = shared ? shared : &own, what = told ? told : nowhere;
}

static int fails_at(const char *call, const char *path) {
  if (!root[0] || strncmp(path, root, strlen(root))) return 0;
  const long n = __atomic_add_fetch(count, 1, __ATOMIC_SEQ_CST);
  if (!at || n < at || (n > at && !persist)) return 0;
  if (n == at) snprintf(what, 4096, "%s %s", call, path);
  errno = number;
  return 1;
}

static int fails(const char *call, int descriptor) {
  char link[64], path[4096];
  if (!root[0]) return 0;
  const int before = errno;
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  const ssize_t length = readlink(link, path, sizeof path - 1);
  errno = before;
  if (length < 0) return 0;
  path[length] = 0;
  return fails_at(call, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define BY_DESCRIPTOR(type, name, declared, passed, descriptor) \
  type name declared {                                         \
    static type(*real) declared;                               \
    if (!real) real = (type(*) declared)dlsym(RTLD_NEXT, #name); \
    return fails(#name, descriptor) ? -1 : real passed;        \
  }
#define BY_PATH(name, declared, passed, path)                  \
  int name declared {                                          \
    static int(*real) declared;                                \
    if (!real) real = (int(*) declared)dlsym(RTLD_NEXT, #name); \
    return fails_at(#name, path) ? -1 : real passed;           \
  }
#define ALLOCATE(name, offset)                                 \
  int name(int fd, offset from, offset length) {               \
    static int (*real)(int, offset, offset);                   \
    if (!real) real = (int (*)(int, offset, offset))dlsym(RTLD_NEXT, #name); \
    return fails(#name, fd) ? number : real(fd, from, length); \
  }
#define OPEN(name)                                             \
  int name(const char *path, int flags, ...) {                 \
    static int (*real)(const char *, int, ...);                \
    if (!real) real = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #name); \
    va_list rest;                                              \
    va_start(rest, flags);                                     \
    const mode_t mode = va_arg(rest, mode_t);                  \
    va_end(rest);                                              \
    if ((flags & (O_CREAT | O_TRUNC)) && fails_at(#name, path)) return -1; \
    return real(path, flags, mode);                            \
  }

BY_DESCRIPTOR(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size), fd)
BY_DESCRIPTOR(ssize_t, pwrite, (int fd, const void *data, size_t size, off_t to), (fd, data, size, to), fd)
BY_DESCRIPTOR(ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t to), (fd, data, size, to), fd)
BY_DESCRIPTOR(ssize_t, writev, (int fd, const struct iovec *parts, int count_), (fd, parts, count_), fd)
BY_DESCRIPTOR(ssize_t, pwritev, (int fd, const struct iovec *parts, int count_, off_t to), (fd, parts, count_, to), fd)
BY_DESCRIPTOR(ssize_t, pwritev64, (int fd, const struct iovec *parts, int count_, off64_t to),
              (fd, parts, count_, to), fd)
BY_DESCRIPTOR(ssize_t, pwritev2, (int fd, const struct iovec *parts, int count_, off_t to, int flags),
              (fd, parts, count_, to, flags), fd)
BY_DESCRIPTOR(ssize_t, pwritev64v2, (int fd, const struct iovec *parts, int count_, off64_t to, int flags),
              (fd, parts, count_, to, flags), fd)
BY_DESCRIPTOR(ssize_t, sendfile, (int to, int from, off_t *offset, size_t size), (to, from, offset, size), to)
BY_DESCRIPTOR(ssize_t, sendfile64, (int to, int from, off64_t *offset, size_t size), (to, from, offset, size), to)
BY_DESCRIPTOR(ssize_t, copy_file_range, (int from, off64_t *start, int to, off64_t *offset, size_t size, unsigned flags),
              (from, start, to, offset, size, flags), to)
BY_DESCRIPTOR(int, fsync, (int fd), (fd), fd)
BY_DESCRIPTOR(int, fdatasync, (int fd), (fd), fd)
BY_DESCRIPTOR(int, ftruncate, (int fd, off_t size), (fd, size), fd)
BY_DESCRIPTOR(int, ftruncate64, (int fd, off64_t size), (fd, size), fd)
ALLOCATE(posix_fallocate, off_t)
ALLOCATE(posix_fallocate64, off64_t)
BY_PATH(rename, (const char *from, const char *to), (from, to), to)
BY_PATH(renameat, (int a, const char *from, int b, const char *to), (a, from, b, to), to)
BY_PATH(link, (const char *from, const char *to), (from, to), to)
BY_PATH(linkat, (int a, const char *from, int b, const char *to, int flags), (a, from, b, to, flags), to)
BY_PATH(mkdir, (const char *path, mode_t mode), (path, mode), path)
OPEN(open)
OPEN(open64)
