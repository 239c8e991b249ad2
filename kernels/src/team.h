// A team is the threads that go through one call together, with barriers between its steps.
//
// The host's pool may give fewer threads than asked for: inside a parallel region of the host it gives one; in other pools
// tasks wait in a line, perhaps behind those of another caller that wait themselves. So nobody counts on a thread that is not
// there: a thread joins when it runs, the team closes after a moment, and who comes late goes away again. All who meet at a
// barrier are running threads.
#pragma once

#include <stdint.h>

#if defined(_WIN32)
extern "C" __declspec(dllimport) int __stdcall SwitchToThread(void);
#else
#include <sched.h>
#endif

namespace {

class Team {
   public:
    // expected: the number of tasks that the pool was given.
    explicit Team(int32_t expected) : expected(expected) {}

    // Joins for a number of tasks. Returns the thread's number, or -1 if the team has closed.
    int32_t join(int64_t tasks) {
        int64_t seen = __atomic_load_n(&list, __ATOMIC_ACQUIRE), mine;
        do {
            if (seen & closed) return -1;
            mine = seen + 1 + tasks * task;
            if (mine / task >= expected) mine |= closed;
        } while (!__atomic_compare_exchange_n(&list, &seen, mine, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE));
        const int32_t number = int32_t(seen % task);
        for (int64_t turns = 0; !(__atomic_load_n(&list, __ATOMIC_ACQUIRE) & closed); turns++) {
            if (turns < spins + yields) pause(turns);
            else __atomic_fetch_or(&list, closed, __ATOMIC_ACQ_REL);
        }
        return number;
    }

    // The number of threads, once the team has closed.
    int32_t size() const { return int32_t(__atomic_load_n(&list, __ATOMIC_ACQUIRE) % task); }

    // Waits until all have come here.
    void meet() {
        const int32_t all = size();
        if (all == 1) return;
        const int32_t now = __atomic_load_n(&round, __ATOMIC_RELAXED);
        if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == all) {
            __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
            __atomic_store_n(&round, now + 1, __ATOMIC_RELEASE);
            return;
        }
        for (int64_t turns = 0; __atomic_load_n(&round, __ATOMIC_ACQUIRE) == now; turns++) pause(turns);
    }

   private:
    static constexpr int64_t task = 1 << 16, closed = int64_t(1) << 62;  // in the list: threads, tasks above them, and whether it is closed
    static constexpr int64_t spins = 2000, yields = 200;

    // A short wait; after many, the processor goes to another thread that wants it.
    static void pause(int64_t turns) {
        if (turns < spins) {
#if defined(__x86_64__) || defined(_M_X64)
            __builtin_ia32_pause();
#elif defined(__aarch64__)
            __asm__ volatile("yield");
#endif
            return;
        }
#if defined(_WIN32)
        SwitchToThread();
#else
        sched_yield();
#endif
    }

    const int32_t expected;
    alignas(64) int64_t list = 0;
    alignas(64) int32_t arrived = 0;
    alignas(64) int32_t round = 0;
};

}  // namespace
