/*
 * intrude PID CALL: has the first thread of a process make a system call, as code
 * would that got into it, and writes what it returns. The code is where the program
 * began: no thread comes there again.
 */
#include <elf.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ptrace.h>
#include <sys/user.h>
#include <sys/wait.h>

/* SYSCALL; INT3. */
#define CODE 0xcc050full

/* The address of a process's first instruction, or 0. */
static unsigned long entry(int pid)
{
	char path[32];
	Elf64_auxv_t word = { 0 };
	FILE *f;

	snprintf(path, sizeof(path), "/proc/%d/auxv", pid);
	f = fopen(path, "r");
	while (f != NULL && fread(&word, sizeof(word), 1, f) == 1)
		if (word.a_type == AT_ENTRY)
			return word.a_un.a_val;
	return 0;
}

int main(int argc, char **argv)
{
	struct user_regs_struct before, now;
	unsigned long place;
	int pid, status, step = 0;
	long text;

	if (argc != 3)
		return 2;
	pid = atoi(argv[1]);
	place = entry(pid);
	if (ptrace(PTRACE_SEIZE, pid, 0, 0) || ptrace(PTRACE_INTERRUPT, pid, 0, 0) ||
	    waitpid(pid, &status, __WALL) < 0 || ptrace(PTRACE_GETREGS, pid, 0, &before)) {
		perror("intrude");
		return 1;
	}
	errno = 0;
	text = ptrace(PTRACE_PEEKTEXT, pid, place, 0);
	if (errno != 0 ||
	    ptrace(PTRACE_POKETEXT, pid, place, (text & ~0xffffffl) | CODE)) {
		perror("intrude");
		return 1;
	}
	now = before;
	now.rax = atoi(argv[2]);
	now.orig_rax = -1;
	now.rip = place;
	now.rdi = now.rsi = now.rdx = 0;
	if (ptrace(PTRACE_SETREGS, pid, 0, &now))
		return 1;
	/* Its own signals are delivered, until it has come to the INT3. */
	do {
		ptrace(PTRACE_CONT, pid, 0, step);
		if (waitpid(pid, &status, __WALL) < 0 || !WIFSTOPPED(status)) {
			puts("ended");
			return 1;
		}
		step = WSTOPSIG(status);
	} while (step != SIGTRAP);
	if (ptrace(PTRACE_GETREGS, pid, 0, &now) ||
	    ptrace(PTRACE_POKETEXT, pid, place, text) ||
	    ptrace(PTRACE_SETREGS, pid, 0, &before) || ptrace(PTRACE_DETACH, pid, 0, 0)) {
		perror("intrude");
		return 1;
	}
	printf("returns %ld\n", (long)now.rax);
	return 0;
}
