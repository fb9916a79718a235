/* The benchmark's own small programs, in one static file: what Debian's packages do not measure by themselves.
 *
 * kernels WHAT [SIZE] does WHAT, SIZE times, and prints a result that depends on all of the work and on nothing else, so that
 * every machine must print the same. `seed` and `text` and `source` are for setting up and are not timed.
 */
#include <fcntl.h>
#include <linux/random.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <unistd.h>

static uint64_t state = 88172645463325252ull;

static uint64_t next_random(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static void fail(const char *what) {
    perror(what);
    exit(1);
}

/* Two processes hand a number to and fro. */
static void ping_pong(long rounds) {
    int there[2], back[2];
    uint64_t n = 0;
    if (pipe(there) || pipe(back)) fail("pipe");
    pid_t child = fork();
    if (child < 0) fail("fork");
    if (child == 0) {
        close(there[1]);
        while (read(there[0], &n, sizeof n) == sizeof n) {
            n = n * 3 + 1;
            if (write(back[1], &n, sizeof n) != sizeof n) _exit(1);
        }
        _exit(0);
    }
    for (long i = 0; i < rounds; i++) {
        if (write(there[1], &n, sizeof n) != sizeof n || read(back[0], &n, sizeof n) != sizeof n) fail("ping-pong");
    }
    close(there[1]);
    waitpid(child, NULL, 0);
    printf("%016llx\n", (unsigned long long)n);
}

/* A process that does nothing is made and waited for. */
static void fork_exec(long rounds) {
    long good = 0;
    for (long i = 0; i < rounds; i++) {
        int status;
        pid_t child = fork();
        if (child < 0) fail("fork");
        if (child == 0) {
            execl("/bin/true", "true", (char *)NULL);
            _exit(127);
        }
        if (waitpid(child, &status, 0) == child && status == 0) good++;
    }
    printf("%ld\n", good);
}

/* Each load tells where the next one goes: 64 MiB in lines of 64 bytes, in one random circle. */
static void chase(long loads) {
    const size_t lines = (64u << 20) / 64;
    uint64_t(*memory)[8] = malloc(lines * 64);
    uint32_t *order = malloc(lines * sizeof *order);
    if (!memory || !order) fail("malloc");
    for (size_t i = 0; i < lines; i++) order[i] = i;
    for (size_t i = lines - 1; i > 0; i--) {
        size_t j = next_random() % (i + 1);
        uint32_t t = order[i];
        order[i] = order[j];
        order[j] = t;
    }
    for (size_t i = 0; i < lines; i++) memory[order[i]][0] = order[(i + 1) % lines];
    uint64_t at = 0;
    for (long i = 0; i < loads; i++) at = memory[at][0];
    printf("%llu\n", (unsigned long long)at);
}

/* Copies 32 MiB to another 32 MiB with plain 8-byte loads and stores (what a compiler makes of a loop). */
static void stream(long passes) {
    const size_t words = (32u << 20) / 8;
    uint64_t *from = malloc(words * 8), *to = malloc(words * 8), sum = 0;
    if (!from || !to) fail("malloc");
    for (size_t i = 0; i < words; i++) from[i] = next_random();
    for (long pass = 0; pass < passes; pass++) {
        for (size_t i = 0; i < words; i++) to[i] = from[i] + pass;
        __asm__ volatile("" : : "r"(to) : "memory");
        sum += to[(pass * 4099) % words];
    }
    printf("%016llx\n", (unsigned long long)sum);
}

/* What embedded benchmarks do: a linked list, a matrix, a state machine, a checksum. */
struct node {
    struct node *next;
    uint32_t value;
};

static uint32_t crc(uint32_t crc, uint32_t value) {
    for (int bit = 0; bit < 32; bit++, value >>= 1) crc = (crc >> 1) ^ (0xedb88320u & -((crc ^ value) & 1));
    return crc;
}

static void integer(long rounds) {
    static struct node nodes[256];
    static int32_t a[24][24], b[24][24];
    const char *text = "12,-34,5.6e7,x,0x1f,+9,.5,hello,77,1e-3,";
    uint32_t sum = 0xffffffffu;
    for (int i = 0; i < 24; i++)
        for (int j = 0; j < 24; j++) a[i][j] = i * 7 - j, b[i][j] = j * 3 + i;
    for (long round = 0; round < rounds; round++) {
        struct node *head = NULL;
        for (int i = 0; i < 256; i++) {
            nodes[i].value = (i * 2654435761u + round) >> 7;
            struct node **at = &head;
            for (int steps = 0; *at && (*at)->value < nodes[i].value && steps < 16; steps++) at = &(*at)->next;
            nodes[i].next = *at;
            *at = &nodes[i];
        }
        for (struct node *n = head; n; n = n->next) sum = sum * 31 + n->value;
        for (int i = 0; i < 24; i++)
            for (int j = 0; j < 24; j++) {
                int32_t cell = 0;
                for (int k = 0; k < 24; k++) cell += a[i][k] * b[k][j];
                sum += cell;
            }
        int field = 0, counts[5] = {0};
        for (const char *c = text; *c; c++) {
            switch (field) {
            case 0: field = (*c >= '0' && *c <= '9') ? 1 : (*c == '-' || *c == '+') ? 2 : *c == '.' ? 3 : 4; break;
            case 1: if (*c == '.') field = 3; else if (*c < '0' || *c > '9') field = 4; break;
            case 2: field = (*c >= '0' && *c <= '9') ? 1 : 4; break;
            case 3: if (*c == 'e') field = 2; else if (*c < '0' || *c > '9') field = 4; break;
            }
            if (*c == ',') counts[field]++, field = 0;
        }
        for (int i = 0; i < 5; i++) sum = crc(sum, counts[i] + round);
    }
    printf("%08x\n", sum);
}

/* Text that compresses about as English does: words of a made-up vocabulary, the frequent ones short. */
static void text(long kilobytes) {
    static char words[2048][12];
    for (int i = 0; i < 2048; i++) {
        int length = 2 + i / 300 + next_random() % 3;
        for (int j = 0; j < length; j++) words[i][j] = "etaoinshrdlucmfwypvbgkqjxz"[(next_random() % 26) * (next_random() % 26) / 26];
        words[i][length] = 0;
    }
    for (long left = kilobytes * 1024; left > 0;) {
        uint64_t r = next_random();
        const char *word = words[(r % 2048) * ((r >> 20) % 2048) / 2048];
        int length = strlen(word);
        fputs(word, stdout);
        putchar((r >> 50) % 12 ? ' ' : '\n');
        left -= length + 1;
    }
}

/* A C program of so many functions, for a compiler to chew on. */
static void source(long functions) {
    puts("struct item { int key; double weight; struct item *next; unsigned char name[16]; };");
    puts("static int table[64];");
    for (long i = 0; i < functions; i++) {
        int k = next_random() % 64;
        printf("static int work_%ld(struct item *list, int n) {\n", i);
        printf("    int sum = %d;\n    double mean = 0;\n    struct item *at;\n", k);
        printf("    for (at = list; at && n > 0; at = at->next, n--) {\n");
        printf("        switch ((at->key + %d) & 3) {\n        case 0: sum += at->key * %d; break;\n", k, k + 3);
        printf("        case 1: sum ^= table[(sum + %d) & 63] << %d; break;\n", k, k % 8);
        printf("        case 2: mean += at->weight / (n + %d.5); break;\n", k);
        printf("        default: at->name[sum & 15] = (unsigned char)(n - %d); table[n & 63]--;\n        }\n    }\n", k);
        printf("    while (n < %d) { n += 1 + (sum & 7); sum -= n > 9 ? n / 3 : -n; }\n", k + 40);
        if (i > 0) printf("    if (sum %% %d == 1) sum += work_%ld(list, n - 1);\n", k + 2, i - 1);
        printf("    return sum + (int)mean;\n}\n");
    }
    printf("int work(struct item *list, int n) { return work_%ld(list, n); }\n", functions - 1);
}

/* A machine that is busy with its memory: so many MiB keep what was written to them once, as many are written anew all the time. After each pass it says a sum of
 * what was kept, so that a bit of it that flips is seen. It ends when somebody ends it. */
static void busy(long mebibytes) {
    size_t words = (size_t)mebibytes << 17;
    uint64_t *kept = malloc(words * 8), *moving = malloc(words * 8), filled;
    if (!kept || !moving) fail("busy");
    memcpy(&filled, "ABCDEFG\n", 8);
    for (size_t i = 0; i < words; i++) kept[i] = filled;
    for (uint64_t pass = 1;; pass++) {
        for (size_t i = 0; i < words; i++) moving[i] = pass * 0x9e3779b97f4a7c15 + i;
        uint64_t sum = 0;
        for (size_t i = 0; i < words; i++) sum += kept[i];
        printf("PAIR pass %llu %016llx\n", (unsigned long long)pass, (unsigned long long)sum);
        fflush(stdout);
    }
}

/* Tells the kernel that its random numbers are good, so that no program waits for them. For the benchmark's guest alone. */
static void seed(void) {
    struct {
        struct rand_pool_info info;
        uint32_t bytes[64];
    } pool = {.info = {.entropy_count = 64 * 32, .buf_size = 64 * 4}};
    for (int i = 0; i < 64; i++) pool.bytes[i] = next_random() >> 16;
    int file = open("/dev/random", O_WRONLY);
    if (file < 0 || ioctl(file, RNDADDENTROPY, &pool) != 0) fail("seed");
}

int main(int count, char **words) {
    const char *what = count > 1 ? words[1] : "";
    long size = count > 2 ? atol(words[2]) : 1;
    if (!strcmp(what, "pipe")) ping_pong(size);
    else if (!strcmp(what, "fork")) fork_exec(size);
    else if (!strcmp(what, "chase")) chase(size);
    else if (!strcmp(what, "stream")) stream(size);
    else if (!strcmp(what, "integer")) integer(size);
    else if (!strcmp(what, "text")) text(size);
    else if (!strcmp(what, "source")) source(size);
    else if (!strcmp(what, "busy")) busy(size);
    else if (!strcmp(what, "seed")) seed();
    else {
        fprintf(stderr, "kernels: no such work: %s\n", what);
        return 2;
    }
    return fflush(stdout) ? 1 : 0;
}
