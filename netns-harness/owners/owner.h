/* Declarations shared by the files of the owner; see owner.c. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

extern atomic_long count; /* checks that passed */

/* owner.c */
void fail(const char *format, ...);
void die(const char *step);
int64_t now_ns(void);
pthread_t start(void *(*run)(void *), void *argument);
int dead_socket(void);

/* waits.c */
void waits(int forgiving);
long forgiven(void);
int waits_on(const char *mode);
int wait_on(const char *mode, int fd);
int leak_onto(int fd);
int leak_waited_on(const char *mode);

/* works.c */
void works(void);
void *churns(void *unused);
long taken(void);

/* reacts.c */
int reacts(const char *mode);
void react(const char *mode, int fd);

/* transfers.c */
int has_transfer(const char *mode);
void transfer(const char *mode);
long finish_transfer(void);

/* hangs.c */
void be_hanging(void);
int hang(const char *when);

/* locks.c */
int lock(int fd);
long unlock(void);

/* spins.c */
int has_loop(const char *mode);
int keeps_peers(const char *mode);
void be_looping(const char *mode);
void pause_reading(int fd);
void fork_loop(void);
long take_wakes(void);

/* ring.c */
int has_ring(const char *mode);
void be_in_ring(const char *mode, int listener);
long accepted_by_ring(void);
void put_into_ring(const char *mode, int fd);
