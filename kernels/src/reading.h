// Reads many pieces of files at a time. The threads wait for the disk and compute nothing, so there are more than processors.
#pragma once

#include <stdint.h>

#if defined(_WIN32)
inline void* begin_reading(int32_t, int64_t, const int64_t*, const int64_t*, void*, const int64_t*) { return nullptr; }
inline int64_t end_reading(void*) { return 0; }
#else
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <new>

namespace {

constexpr int64_t READERS = 32;  // more were no faster on an NVMe disk
constexpr size_t STACK = 128 << 10;

// Pieces that are read: threads take one after another.
struct Reading {
    const pid_t process = getpid();
    const int32_t file;
    const int64_t count;
    const int64_t *starts, *sizes;
    char* to;
    const int64_t* places;
    std::atomic<int64_t> next{0}, whole;  // the piece to take next; the first that could not be read
    int64_t threads = 0;                  // how many threads read
    Reading* behind = nullptr;
    Reading(int32_t file, int64_t count, const int64_t* starts, const int64_t* sizes, void* to, const int64_t* places)
        : file(file), count(count), starts(starts), sizes(sizes), to((char*)to), places(places), whole(count) {}

    void read() {
        for (int64_t n; (n = next.fetch_add(1)) < count;)
            if (!read_piece(n))
                for (int64_t least = whole; n < least && !whole.compare_exchange_weak(least, n);) {}
    }
    bool is_taken() const { return next >= count; }

   private:
    bool read_piece(int64_t n) const {
        for (int64_t done = 0; done < sizes[n];) {
            const int64_t got = pread(file, to + places[n] + done, sizes[n] - done, starts[n] + done);
            if (got > 0) done += got;
            else if (got == 0 || errno != EINTR) return false;
        }
        return true;
    }
};

// The threads of this process. Those of a parent do not come along when it forks, so a child makes its own.
class Readers {
   public:
    // The readers of this process; null if there is no memory. They are never freed, because threads wait in them.
    static Readers* here() {
        static std::atomic<Readers*> made{nullptr};
        Readers* found = made;
        while (!found || found->process != getpid()) {
            Readers* own = new (std::nothrow) Readers;
            if (!own) return nullptr;
            if (made.compare_exchange_strong(found, own)) return own;
            delete own;
        }
        return found;
    }

    // Begins to read; false if there is no thread to do so.
    bool begin(Reading* reading) {
        pthread_mutex_lock(&lock);
        while (threads < READERS && threads < reading->count && start()) {}
        const int64_t there = threads;
        if (there) {
            (first ? last->behind : first) = reading;
            last = reading;
        }
        pthread_mutex_unlock(&lock);
        for (int64_t n = 0; n < there && n < reading->count; n++) pthread_cond_signal(&work);
        return there;
    }

    void wait(Reading* reading) {
        pthread_mutex_lock(&lock);
        while (reading->threads || !reading->is_taken()) pthread_cond_wait(&done, &lock);
        remove(reading);
        pthread_mutex_unlock(&lock);
    }

   private:
    const pid_t process = getpid();
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t work = PTHREAD_COND_INITIALIZER, done = PTHREAD_COND_INITIALIZER;
    Reading *first = nullptr, *last = nullptr;
    int64_t threads = 0;

    // Starts a thread, which takes no signals: those are for the threads of the host.
    bool start() {
        sigset_t all, before;
        pthread_attr_t how;
        pthread_t thread;
        if (pthread_attr_init(&how)) return false;
        pthread_attr_setdetachstate(&how, PTHREAD_CREATE_DETACHED);
        pthread_attr_setstacksize(&how, STACK);
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        const bool started = !pthread_create(&thread, &how, run, this);
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        pthread_attr_destroy(&how);
        threads += started;
        return started;
    }
    static void* run(void* self) {
        ((Readers*)self)->work_on();
        return nullptr;
    }
    [[noreturn]] void work_on() {
        pthread_mutex_lock(&lock);
        for (;;) {
            while (first && first->is_taken()) remove(first);
            Reading* reading = first;
            if (!reading) {
                pthread_cond_wait(&work, &lock);
                continue;
            }
            reading->threads++;
            pthread_mutex_unlock(&lock);
            reading->read();
            pthread_mutex_lock(&lock);
            if (!--reading->threads) pthread_cond_broadcast(&done);
        }
    }
    // Takes a reading out of the line, if it is in it.
    void remove(Reading* reading) {
        Reading* before = nullptr;
        for (Reading* one = first; one; before = one, one = one->behind) {
            if (one != reading) continue;
            (before ? before->behind : first) = one->behind;
            if (last == one) last = before;
            one->behind = nullptr;
            return;
        }
    }
};

inline void* begin_reading(
    int32_t file, int64_t count, const int64_t* starts, const int64_t* sizes, void* to, const int64_t* places) {
    Readers* readers = Readers::here();
    Reading* reading = readers ? new (std::nothrow) Reading(file, count, starts, sizes, to, places) : nullptr;
    if (reading && readers->begin(reading)) return reading;
    delete reading;
    return nullptr;
}

inline int64_t end_reading(void* begun) {
    Reading* reading = (Reading*)begun;
    if (reading->process != getpid()) return 0;  // begun before a fork: nobody reads here, and the parent goes on
    Readers::here()->wait(reading);
    const int64_t whole = reading->whole;
    delete reading;
    return whole;
}

}  // namespace
#endif
