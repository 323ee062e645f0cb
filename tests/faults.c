/* Preloaded, this fails the n-th call that writes below a folder, or kills the process in it.
   cc -shared -fPIC -o faults.so tests/faults.c -ldl; LD_PRELOAD=./faults.so; see tests/faults.py */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, FULL, BROKEN, KILL }; /* a disk without space stays so; one error of EIO is one */

static char folder[4096];
static long at, calls;
static int action, armed;

void faults_arm(const char *path, long n, int what) {
    strncpy(folder, path, sizeof folder - 1);
    at = n, action = what, calls = 0, armed = 1;
}

long faults_calls(void) { return calls; }

static int below(const char *path) { return strncmp(path, folder, strlen(folder)) == 0; }

/* What the call is to do: 0 go through, 1 half of it and then fail or die, 2 fail */
static int strike(const char *path, int frees) {
    if (!armed || !below(path)) return 0;
    long i = __atomic_fetch_add(&calls, 1, __ATOMIC_SEQ_CST);
    if (action == COUNT || (frees && action == FULL)) return 0;
    return i == at ? 1 : i > at && action == FULL ? 2 : 0;
}

static int strike_fd(int fd, int frees) {
    char link[64], path[4096];
    if (!armed) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return strike(path, frees);
}

static int fail(void) {
    if (action == KILL) kill(getpid(), SIGKILL);
    errno = action == FULL ? ENOSPC : EIO;
    return -1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t n) {
    int what = strike_fd(fd, 0);
    if (what == 1 && n > 1) { /* a torn write: what a full disk and a kill leave */
        ssize_t half = REAL(write)(fd, data, n / 2);
        if (action == FULL && half > 0) return half; /* the rest is what finds it full */
        return fail();
    }
    return what ? fail() : REAL(write)(fd, data, n);
}

ssize_t pwrite(int fd, const void *data, size_t n, off_t from) {
    return strike_fd(fd, 0) ? fail() : REAL(pwrite)(fd, data, n, from);
}
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t from) {
    return strike_fd(fd, 0) ? fail() : REAL(pwrite64)(fd, data, n, from);
}
ssize_t writev(int fd, const struct iovec *parts, int n) {
    return strike_fd(fd, 0) ? fail() : REAL(writev)(fd, parts, n);
}
ssize_t sendfile(int to, int from, off_t *start, size_t n) {
    return strike_fd(to, 0) ? fail() : REAL(sendfile)(to, from, start, n);
}
ssize_t sendfile64(int to, int from, off64_t *start, size_t n) {
    return strike_fd(to, 0) ? fail() : REAL(sendfile64)(to, from, start, n);
}
ssize_t copy_file_range(int from, off64_t *i, int to, off64_t *o, size_t n, unsigned flags) {
    return strike_fd(to, 0) ? fail() : REAL(copy_file_range)(from, i, to, o, n, flags);
}
int fsync(int fd) { return strike_fd(fd, 0) ? fail() : REAL(fsync)(fd); }
int ftruncate(int fd, off_t n) { return strike_fd(fd, 1) ? fail() : REAL(ftruncate)(fd, n); }
int ftruncate64(int fd, off64_t n) { return strike_fd(fd, 1) ? fail() : REAL(ftruncate64)(fd, n); }
int mkdir(const char *path, mode_t mode) {
    return strike(path, 0) ? fail() : REAL(mkdir)(path, mode);
}
int rename(const char *old, const char *new) {
    return strike(new, 0) ? fail() : REAL(rename)(old, new);
}
int link(const char *old, const char *new) {
    return strike(new, 0) ? fail() : REAL(link)(old, new);
}
int unlink(const char *path) { return strike(path, 1) ? fail() : REAL(unlink)(path); }
int rmdir(const char *path) { return strike(path, 1) ? fail() : REAL(rmdir)(path); }
int unlinkat(int fd, const char *path, int flags) { /* shutil.rmtree's */
    return strike_fd(fd, 1) && action == KILL ? fail() : REAL(unlinkat)(fd, path, flags);
}

#define OPEN(name)                                                          \
    int name(const char *path, int flags, ...) {                            \
        va_list rest;                                                       \
        va_start(rest, flags);                                              \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, int) : 0; \
        va_end(rest);                                                       \
        if (flags & O_CREAT && strike(path, 0)) return fail();              \
        return REAL(name)(path, flags, mode);                               \
    }
OPEN(open)
OPEN(open64)
