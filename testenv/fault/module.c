/* A PKCS#11 module that passes every call on to another one, but for the rules in a
   file. fault.go says what the rules are; the two must agree on the files.

   Beside this library lie real.so, the module that does the work, and faults, a struct
   faults that all processes share: so rules reach processes that run, and counts
   outlive those that end. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include "pkcs11go.h"

#define FUNCTIONS 80
#define RULES 8192

struct rule {
	char function[32], action[16];
	unsigned long value, times, after;
	unsigned long seen, hits; /* ours; all else is written by others */
};

static struct faults {
	struct { char name[32]; unsigned long calls; } functions[FUNCTIONS]; /* ours */
	unsigned long from, to; /* rules[from] to rules[to-1] stand */
	struct rule rules[RULES];
} *faults;

static CK_FUNCTION_LIST_PTR real;
static CK_FUNCTION_LIST odd;  /* real, but for what some tokens do otherwise */
static CK_FUNCTION_LIST mine; /* odd, under the rules */
static __thread unsigned long struck; /* the rule that strikes this thread's call */
#define NONE (~0UL)

/* A broken harness must not look like a token that works. */
static void die(const char *format, ...) {
	va_list args;
	va_start(args, format);
	fputs("fault module: ", stderr);
	vfprintf(stderr, format, args);
	fputs("\n", stderr);
	abort();
}

/* Finds the first rule that strikes this call. */
static unsigned long find_rule(const char *function) {
	unsigned long to = __atomic_load_n(&faults->to, __ATOMIC_SEQ_CST);
	for (unsigned long i = __atomic_load_n(&faults->from, __ATOMIC_SEQ_CST); i < to; i++) {
		struct rule *r = &faults->rules[i];
		if (strcmp(r->function, function) && strcmp(r->function, "*")) continue;
		unsigned long seen = __atomic_fetch_add(&r->seen, 1, __ATOMIC_SEQ_CST);
		if (seen < r->after || (r->times && seen >= r->after + r->times)) continue;
		__atomic_fetch_add(&r->hits, 1, __ATOMIC_SEQ_CST);
		return i;
	}
	return NONE;
}

static int does(const char *action) { return struck != NONE && !strcmp(faults->rules[struck].action, action); }

static CK_RV value(void) { return faults->rules[struck].value; }

static void lose_sessions(void) {
	CK_SLOT_ID slots[256];
	CK_ULONG n = 256;
	if (real->C_GetSlotList(CK_TRUE, slots, &n) != CKR_OK) return; /* not initialised: there are none */
	while (n > 0) real->C_CloseAllSessions(slots[--n]);
}

/* Tells whether a call is answered here, by value(). */
static int answered(const char *function) {
	struck = find_rule(function);
	if (does("segv")) *(volatile int *)0 = 1;
	if (does("abort")) abort();
	if (does("slow")) usleep(value() * 1000);
	while (does("hang") && struck >= __atomic_load_n(&faults->from, __ATOMIC_SEQ_CST)) usleep(5000);
	if (does("lose-sessions") || does("gone")) lose_sessions();
	if (does("gone")) /* what asks no token works */
		return strcmp(function, "C_GetSlotList") && strcmp(function, "C_Initialize") && strcmp(function, "C_Finalize") && strcmp(function, "C_GetInfo");
	return does("rv");
}

/* What some tokens do otherwise. */

static CK_RV odd_C_GetSlotList(CK_BBOOL present, CK_SLOT_ID_PTR slots, CK_ULONG_PTR n) {
	if (!does("gone")) return real->C_GetSlotList(present, slots, n);
	*n = 0;
	return CKR_OK;
}

static CK_RV odd_C_GetTokenInfo(CK_SLOT_ID slot, CK_TOKEN_INFO_PTR info) {
	CK_RV rv = real->C_GetTokenInfo(slot, info);
	if (rv == CKR_OK && does("flags")) info->flags |= value();
	return rv;
}

/* What C_EncryptInit left for C_Encrypt, by session. */
static struct { int append; CK_BYTE iv[16]; } gcm[4096];
#define GCM(session) gcm[(session) % (sizeof gcm / sizeof *gcm)]

static CK_RV odd_C_EncryptInit(CK_SESSION_HANDLE s, CK_MECHANISM_PTR m, CK_OBJECT_HANDLE k) {
	GCM(s).append = 0;
	if (m->mechanism != CKM_AES_GCM) return real->C_EncryptInit(s, m, k);
	CK_GCM_PARAMS *p = m->pParameter;
	if (does("replace-iv") && getrandom(p->pIv, p->ulIvLen, 0) < 0) die("no randomness");
	if (!does("append-iv")) return real->C_EncryptInit(s, m, k);
	CK_GCM_PARAMS own = *p;
	CK_MECHANISM mechanism = {CKM_AES_GCM, &own, sizeof own};
	GCM(s).append = 1;
	own.pIv = GCM(s).iv;
	own.ulIvLen = sizeof GCM(s).iv;
	own.ulIvBits = 8 * own.ulIvLen;
	if (getrandom(own.pIv, own.ulIvLen, 0) < 0) die("no randomness");
	return real->C_EncryptInit(s, &mechanism, k);
}

static CK_RV odd_C_Encrypt(CK_SESSION_HANDLE s, CK_BYTE_PTR in, CK_ULONG n, CK_BYTE_PTR out, CK_ULONG_PTR size) {
	CK_ULONG room = *size, extra = GCM(s).append ? sizeof GCM(s).iv : 0;
	if (does("short-size") && !out) {
		*size = n;
		return CKR_OK;
	}
	CK_ULONG most = room < extra ? 0 : room - extra;
	*size = most;
	CK_RV rv = real->C_Encrypt(s, in, n, out, size);
	if (rv == CKR_OK && out) memcpy(out + *size, GCM(s).iv, extra);
	*size += extra;
	return rv;
}

#define EACH_FUNCTION \
	X(C_Initialize, 1, CK_VOID_PTR) \
	X(C_Finalize, 1, CK_VOID_PTR) \
	X(C_GetInfo, 1, CK_INFO_PTR) \
	X(C_GetSlotList, 3, CK_BBOOL, CK_SLOT_ID_PTR, CK_ULONG_PTR) \
	X(C_GetSlotInfo, 2, CK_SLOT_ID, CK_SLOT_INFO_PTR) \
	X(C_GetTokenInfo, 2, CK_SLOT_ID, CK_TOKEN_INFO_PTR) \
	X(C_GetMechanismList, 3, CK_SLOT_ID, CK_MECHANISM_TYPE_PTR, CK_ULONG_PTR) \
	X(C_GetMechanismInfo, 3, CK_SLOT_ID, CK_MECHANISM_TYPE, CK_MECHANISM_INFO_PTR) \
	X(C_InitToken, 4, CK_SLOT_ID, CK_UTF8CHAR_PTR, CK_ULONG, CK_UTF8CHAR_PTR) \
	X(C_InitPIN, 3, CK_SESSION_HANDLE, CK_UTF8CHAR_PTR, CK_ULONG) \
	X(C_SetPIN, 5, CK_SESSION_HANDLE, CK_UTF8CHAR_PTR, CK_ULONG, CK_UTF8CHAR_PTR, CK_ULONG) \
	X(C_OpenSession, 5, CK_SLOT_ID, CK_FLAGS, CK_VOID_PTR, CK_NOTIFY, CK_SESSION_HANDLE_PTR) \
	X(C_CloseSession, 1, CK_SESSION_HANDLE) \
	X(C_CloseAllSessions, 1, CK_SLOT_ID) \
	X(C_GetSessionInfo, 2, CK_SESSION_HANDLE, CK_SESSION_INFO_PTR) \
	X(C_GetOperationState, 3, CK_SESSION_HANDLE, CK_BYTE_PTR, CK_ULONG_PTR) \
	X(C_SetOperationState, 5, CK_SESSION_HANDLE, CK_BYTE_PTR, CK_ULONG, CK_OBJECT_HANDLE, CK_OBJECT_HANDLE) \
	X(C_Login, 4, CK_SESSION_HANDLE, CK_USER_TYPE, CK_UTF8CHAR_PTR, CK_ULONG) \
	X(C_Logout, 1, CK_SESSION_HANDLE) \
	X(C_CreateObject, 4, CK_SESSION_HANDLE, CK_ATTRIBUTE_PTR, CK_ULONG, CK_OBJECT_HANDLE_PTR) \
	X(C_CopyObject, 5, CK_SESSION_HANDLE, CK_OBJECT_HANDLE, CK_ATTRIBUTE_PTR, CK_ULONG, CK_OBJECT_HANDLE_PTR) \
	X(C_DestroyObject, 2, CK_SESSION_HANDLE, CK_OBJECT_HANDLE) \
	X(C_GetObjectSize, 3, CK_SESSION_HANDLE, CK_OBJECT_HANDLE, CK_ULONG_PTR) \
	X(C_GetAttributeValue, 4, CK_SESSION_HANDLE, CK_OBJECT_HANDLE, CK_ATTRIBUTE_PTR, CK_ULONG) \
	X(C_SetAttributeValue, 4, CK_SESSION_HANDLE, CK_OBJECT_HANDLE, CK_ATTRIBUTE_PTR, CK_ULONG) \
	X(C_FindObjectsInit, 3, CK_SESSION_HANDLE, CK_ATTRIBUTE_PTR, CK_ULONG) \
	X(C_FindObjects, 4, CK_SESSION_HANDLE, CK_OBJECT_HANDLE_PTR, CK_ULONG, CK_ULONG_PTR) \
	X(C_FindObjectsFinal, 1, CK_SESSION_HANDLE) \
	X(C_EncryptInit, 3, CK_SESSION_HANDLE, CK_MECHANISM_PTR, CK_OBJECT_HANDLE) \
	X(C_Encrypt, 5, CK_SESSION_HANDLE, CK_BYTE_PTR, CK_ULONG, CK_BYTE_PTR, CK_ULONG_PTR) \
	X(C_EncryptUpdate, 5, CK_SESSION_HANDLE, CK_BYTE_PTR, CK_ULONG, CK_BYTE_PTR, CK_ULONG_PTR) \
	X(C_EncryptFinal, 3, CK_SESSION_HANDLE, CK_BYTE_PTR, CK_ULONG_PTR) \
	X(C_DecryptInit, 3, CK_SESSION_HANDLE, CK_MECHANISM_PTR, CK_OBJECT_HANDLE) \
	X(C_Decrypt, 5, CK_SESSION_HANDLE, CK_BYTE_PTR, CK_ULONG, CK_BYTE_PTR, CK_ULONG_PTR) \
	X(C_DecryptUpdate, 5, CK_SESSION_HANDLE, CK_BYTE_PTR, CK_ULONG, CK_BYTE_PTR, CK_ULONG_PTR) \
	X(C_DecryptFinal, 3, CK_SESSION_HANDLE, CK_BYTE_PTR, CK_ULONG_PTR) \
	X(C_DigestInit, 2, CK_SESSION_HANDLE, CK_MECHANISM_PTR) \
	X(C_Digest, 5, CK_SESSION_HANDLE, CK_BYTE_PTR, CK_ULONG, CK_BYTE_PTR, CK_ULONG_PTR) \
	X(C_DigestUpdate, 3, CK_SESSION_HANDLE, CK_BYTE_PTR, CK_ULONG) \
	X(C_DigestKey, 2, CK_SESSION_HANDLE, CK_OBJECT_HANDLE) \
	X(C_DigestFinal, 3, CK_SESSION_HANDLE, CK_BYTE_PTR, CK_ULONG_PTR) \
	X(C_SignInit, 3, CK_SESSION_HANDLE, CK_MECHANISM_PTR, CK_OBJECT_HANDLE) \
	X(C_Sign, 5, CK_SESSION_HANDLE, CK_BYTE_PTR, CK_ULONG, CK_BYTE_PTR, CK_ULONG_PTR) \
	X(C_SignUpdate, 3, CK_SESSION_HANDLE, CK_BYTE_PTR, CK_ULONG) \
	X(C_SignFinal, 3, CK_SESSION_HANDLE, CK_BYTE_PTR, CK_ULONG_PTR) \
	X(C_SignRecoverInit, 3, CK_SESSION_HANDLE, CK_MECHANISM_PTR, CK_OBJECT_HANDLE) \
	X(C_SignRecover, 5, CK_SESSION_HANDLE, CK_BYTE_PTR, CK_ULONG, CK_BYTE_PTR, CK_ULONG_PTR) \
	X(C_VerifyInit, 3, CK_SESSION_HANDLE, CK_MECHANISM_PTR, CK_OBJECT_HANDLE) \
	X(C_Verify, 5, CK_SESSION_HANDLE, CK_BYTE_PTR, CK_ULONG, CK_BYTE_PTR, CK_ULONG) \
	X(C_VerifyUpdate, 3, CK_SESSION_HANDLE, CK_BYTE_PTR, CK_ULONG) \
	X(C_VerifyFinal, 3, CK_SESSION_HANDLE, CK_BYTE_PTR, CK_ULONG) \
	X(C_VerifyRecoverInit, 3, CK_SESSION_HANDLE, CK_MECHANISM_PTR, CK_OBJECT_HANDLE) \
	X(C_VerifyRecover, 5, CK_SESSION_HANDLE, CK_BYTE_PTR, CK_ULONG, CK_BYTE_PTR, CK_ULONG_PTR) \
	X(C_DigestEncryptUpdate, 5, CK_SESSION_HANDLE, CK_BYTE_PTR, CK_ULONG, CK_BYTE_PTR, CK_ULONG_PTR) \
	X(C_DecryptDigestUpdate, 5, CK_SESSION_HANDLE, CK_BYTE_PTR, CK_ULONG, CK_BYTE_PTR, CK_ULONG_PTR) \
	X(C_SignEncryptUpdate, 5, CK_SESSION_HANDLE, CK_BYTE_PTR, CK_ULONG, CK_BYTE_PTR, CK_ULONG_PTR) \
	X(C_DecryptVerifyUpdate, 5, CK_SESSION_HANDLE, CK_BYTE_PTR, CK_ULONG, CK_BYTE_PTR, CK_ULONG_PTR) \
	X(C_GenerateKey, 5, CK_SESSION_HANDLE, CK_MECHANISM_PTR, CK_ATTRIBUTE_PTR, CK_ULONG, CK_OBJECT_HANDLE_PTR) \
	X(C_GenerateKeyPair, 8, CK_SESSION_HANDLE, CK_MECHANISM_PTR, CK_ATTRIBUTE_PTR, CK_ULONG, CK_ATTRIBUTE_PTR, CK_ULONG, CK_OBJECT_HANDLE_PTR, CK_OBJECT_HANDLE_PTR) \
	X(C_WrapKey, 6, CK_SESSION_HANDLE, CK_MECHANISM_PTR, CK_OBJECT_HANDLE, CK_OBJECT_HANDLE, CK_BYTE_PTR, CK_ULONG_PTR) \
	X(C_UnwrapKey, 8, CK_SESSION_HANDLE, CK_MECHANISM_PTR, CK_OBJECT_HANDLE, CK_BYTE_PTR, CK_ULONG, CK_ATTRIBUTE_PTR, CK_ULONG, CK_OBJECT_HANDLE_PTR) \
	X(C_DeriveKey, 6, CK_SESSION_HANDLE, CK_MECHANISM_PTR, CK_OBJECT_HANDLE, CK_ATTRIBUTE_PTR, CK_ULONG, CK_OBJECT_HANDLE_PTR) \
	X(C_SeedRandom, 3, CK_SESSION_HANDLE, CK_BYTE_PTR, CK_ULONG) \
	X(C_GenerateRandom, 3, CK_SESSION_HANDLE, CK_BYTE_PTR, CK_ULONG) \
	X(C_GetFunctionStatus, 1, CK_SESSION_HANDLE) \
	X(C_CancelFunction, 1, CK_SESSION_HANDLE) \
	X(C_WaitForSlotEvent, 3, CK_FLAGS, CK_SLOT_ID_PTR, CK_VOID_PTR)

enum {
#define X(n, ...) index_##n,
	EACH_FUNCTION
#undef X
	functions
};
_Static_assert(functions <= FUNCTIONS, "more functions than there is room for");

#define PASS(n, parameters, arguments) \
	static CK_RV mine_##n parameters { \
		__atomic_fetch_add(&faults->functions[index_##n].calls, 1, __ATOMIC_SEQ_CST); \
		if (answered(#n)) return value(); \
		CK_RV rv = odd.n arguments; \
		return does("rv-after") ? value() : rv; \
	}
#define PASS1(n, A) PASS(n, (A a), (a))
#define PASS2(n, A, B) PASS(n, (A a, B b), (a, b))
#define PASS3(n, A, B, C) PASS(n, (A a, B b, C c), (a, b, c))
#define PASS4(n, A, B, C, D) PASS(n, (A a, B b, C c, D d), (a, b, c, d))
#define PASS5(n, A, B, C, D, E) PASS(n, (A a, B b, C c, D d, E e), (a, b, c, d, e))
#define PASS6(n, A, B, C, D, E, F) PASS(n, (A a, B b, C c, D d, E e, F f), (a, b, c, d, e, f))
#define PASS8(n, A, B, C, D, E, F, G, H) PASS(n, (A a, B b, C c, D d, E e, F f, G g, H h), (a, b, c, d, e, f, g, h))
#define X(n, arity, ...) PASS##arity(n, __VA_ARGS__)
EACH_FUNCTION
#undef X

static void load(void) {
	char path[PATH_MAX];
	Dl_info self;
	if (!dladdr((void *)load, &self) || strlen(self.dli_fname) > PATH_MAX - 16) die("does not know its own path");
	char *name = strrchr(strcpy(path, self.dli_fname), '/') + 1;
	strcpy(name, "faults");
	int fd = open(path, O_RDWR | O_CLOEXEC);
	faults = fd < 0 ? MAP_FAILED : mmap(NULL, sizeof *faults, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (faults == MAP_FAILED) die("cannot map %s: %m", path);
	close(fd);
	strcpy(name, "real.so");
	void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
	if (!library) die("%s", dlerror());
	CK_C_GetFunctionList list = (CK_C_GetFunctionList)dlsym(library, "C_GetFunctionList");
	if (!list || list(&real) != CKR_OK) die("%s has no function list", path);
	odd = mine = *real;
	odd.C_GetSlotList = odd_C_GetSlotList;
	odd.C_GetTokenInfo = odd_C_GetTokenInfo;
	odd.C_EncryptInit = odd_C_EncryptInit;
	odd.C_Encrypt = odd_C_Encrypt;
#define X(n, ...) mine.n = mine_##n; strcpy(faults->functions[index_##n].name, #n);
	EACH_FUNCTION
#undef X
}

CK_RV C_GetFunctionList(CK_FUNCTION_LIST_PTR_PTR list) {
	static pthread_once_t once = PTHREAD_ONCE_INIT;
	pthread_once(&once, load);
	*list = &mine;
	return CKR_OK;
}
